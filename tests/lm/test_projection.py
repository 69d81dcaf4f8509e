"""Projections between vocabularies: against the dense matrix, on disk, and what they refuse."""

import copy
import os
import pickle
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import termwise as tw
from termwise.lm import VocabProjection

EXACT = {"rtol": 1e-13, "atol": 1e-14}


def dense(projection):
    """The matrix, from the rows; the columns must say the same."""
    matrix = torch.zeros(projection.student_vocab, projection.teacher_vocab)
    other = matrix.clone()
    for s in range(projection.student_vocab):
        here = slice(*projection.student_pointers[s : s + 2].tolist())
        matrix[s, projection.student_columns[here]] = projection.student_weights[here]
    for t in range(projection.teacher_vocab):
        here = slice(*projection.teacher_pointers[t : t + 2].tolist())
        other[projection.teacher_rows[here], t] = projection.teacher_weights[here]
    assert torch.equal(matrix, other)
    return matrix


def random_projection(seed, students, teachers, k):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, teachers, (students, k), generator=generator)
    indices[0, 0] = 0  # one entry at least
    weights = torch.rand(students, k, generator=generator).where(indices >= 0, 0)
    matrix = torch.zeros(students, teachers, dtype=torch.float64)
    for s in range(students):
        for i in range(k):
            if indices[s, i] >= 0:
                matrix[s, indices[s, i]] += weights[s, i].double()
    sizes = {"student_vocab": students, "teacher_vocab": teachers}
    return VocabProjection.from_topk(indices, weights, **sizes), matrix.float()


projections = st.builds(
    random_projection,
    st.integers(0, 2**30),
    st.integers(1, 7),
    st.integers(1, 6),
    st.integers(1, 4),
)


def same(first, second):
    assert (first.student_vocab, first.teacher_vocab) == (
        second.student_vocab,
        second.teacher_vocab,
    )
    tensors = [leaf for leaf in pytree.tree_leaves(first) if torch.is_tensor(leaf)]
    others = [leaf for leaf in pytree.tree_leaves(second) if torch.is_tensor(leaf)]
    return len(tensors) == 6 and all(map(torch.equal, tensors, others))


@given(made=projections, seed=st.integers(0, 2**30))
def test_topk_pairs_and_parts_are_the_dense_matrix(made, seed):
    projection, matrix = made
    assert torch.equal(dense(projection), matrix)
    pairs = {(s, t): w.item() for (s, t), w in _entries(projection)}
    again = VocabProjection.from_pairs(
        pairs, student_vocab=projection.student_vocab, teacher_vocab=projection.teacher_vocab
    )
    assert same(again, projection)
    generator = torch.Generator().manual_seed(seed)
    lo, hi = sorted(torch.randint(0, len(matrix) + 1, (2,), generator=generator).tolist())
    assert torch.equal(dense(projection.rows(lo, hi)), matrix[lo:hi])
    ids = torch.randperm(matrix.shape[1], generator=generator)[: 1 + seed % 4]
    assert torch.equal(dense(projection.columns(ids)), matrix[:, ids])


def _entries(projection):
    rows = torch.arange(projection.student_vocab).repeat_interleave(
        projection.student_pointers.diff()
    )
    places = zip(rows.tolist(), projection.student_columns.tolist(), strict=True)
    return zip(places, projection.student_weights, strict=True)


@given(made=projections, seed=st.integers(0, 2**30))
def test_project_is_the_product_and_its_derivatives(made, seed):
    projection, matrix = made
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(2, 3, len(matrix), generator=generator, dtype=torch.float64)
    probs.requires_grad_()
    projected = projection.project(probs)
    torch.testing.assert_close(projected, probs @ matrix.double(), **EXACT)
    (ours,) = torch.autograd.grad(projected.square().sum(), probs, create_graph=True)
    (theirs,) = torch.autograd.grad(
        (probs @ matrix.double()).square().sum(), probs, create_graph=True
    )
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), probs),
        torch.autograd.grad(theirs.square().sum(), probs),
        rtol=1e-12,
        atol=1e-12,
    )


def test_project_in_every_dtype_under_autocast_compiled_and_mapped():
    projection, matrix = random_projection(0, 5, 4, 2)
    probs = torch.rand(3, 5)
    half = probs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = projection.project(half), projection.project(probs)
    torch.testing.assert_close(found, (half.float() @ matrix, probs @ matrix))
    assert projection.project(probs[0]).shape == (4,)
    assert projection.project(probs[:0]).shape == (0, 4)
    assert projection.rows(2, 2).project(torch.zeros(3, 0)).tolist() == [[0.0] * 4] * 3

    def norm(probs):
        return projection.project(probs).square().sum()

    expected = torch.func.grad(norm)(probs)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    leaf = probs.clone().requires_grad_()
    compiled(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(compiled(probs), norm(probs))
    with torch.no_grad():
        torch.testing.assert_close(compiled(leaf), norm(probs))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(norm))(probs), expected)
    torch.testing.assert_close(torch.func.jacrev(projection.project)(probs[0]), matrix.T)


def test_it_copies_pickles_and_moves():
    projection, _ = random_projection(1, 5, 4, 2)
    assert same(copy.deepcopy(projection), projection)
    assert same(pickle.loads(pickle.dumps(projection)), projection)
    assert same(projection.to("cpu"), projection)
    assert projection.to("meta").teacher_weights.is_meta


SIZES = {"student_vocab": 2, "teacher_vocab": 3}


@pytest.mark.parametrize(
    ("indices", "weights", "message"),
    [
        ([[0, 3], [1, 2]], [[1, 1], [1, 1]], "needs teacher tokens from 0 to 2, got 0 to 3"),
        ([[0, -2], [1, 2]], [[1, 1], [1, 1]], "needs teacher tokens from 0 to 2, got -2 to 2"),
        ([[0, -1], [1, 2]], [[1, 0.5], [1, 1]], "needs weight 0 where the index is -1, got 0.5"),
        ([[0, -1], [1, 2]], [[1, torch.nan], [1, 1]], "needs weight 0 where the index is -1"),
        ([[0, 1], [1, 2]], [[1, torch.nan], [1, 1]], "finite and not negative, got nan"),
        ([[0, 1], [1, 2]], [[1, torch.inf], [1, 1]], "finite and not negative, got inf"),
        ([[0, 1], [1, 2]], [[1, -0.5], [1, 1]], "finite and not negative, got -0.5"),
        ([[-1, -1]], [[0, 0]], "needs at least 1 entry, got none"),
        ([[0]] * 3, [[1]] * 3, "needs at most student_vocab = 2 rows, got 3"),
    ],
)
def test_topk_that_cannot_be_right_is_refused(indices, weights, message):
    arrays = torch.tensor(indices), torch.tensor(weights, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"VocabProjection.from_topk .*{message}"):
        VocabProjection.from_topk(*arrays, **SIZES)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({(2, 0): 1.0}, "needs student tokens from 0 to 1, got 2 to 2"),
        ({(0, -1): 1.0}, "needs teacher tokens from 0 to 2, got -1 to -1"),
        ({(0, 0): -1.0}, "finite and not negative, got -1"),
        ({(0, 0): torch.nan}, "finite and not negative, got nan"),
        ({}, "needs at least 1 entry, got none"),
    ],
)
def test_pairs_that_cannot_be_right_are_refused(pairs, message):
    with pytest.raises(ValueError, match=f"VocabProjection.from_pairs .*{message}"):
        VocabProjection.from_pairs(pairs, **SIZES)


def test_other_refusals():
    projection, _ = random_projection(2, 3, 4, 2)
    with pytest.raises(ValueError, match="rows needs 0 <= lo <= hi <= 3, got 2 and 4"):
        projection.rows(2, 4)
    with pytest.raises(ValueError, match="columns needs ids from 0 to 3, got 1 to 4"):
        projection.columns(torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="columns needs every id once"):
        projection.columns(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="project needs probs over 3 student tokens, got 4"):
        projection.project(torch.rand(2, 4))
    with pytest.raises(tw.ContractError, match="probs needs Float"):
        projection.project(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"needs student_pointers of shape \[10\] in torch.int64"):
        VocabProjection(9, *pytree.tree_leaves(projection)[1:])


def test_tokens_of_equal_text_and_others_re_encoded():
    student = ["ab", "abc", "\u00e9", None, "", "x", "aab", b"c"]
    teacher = [b"a", b"ab", b"c", None, b"\xc3", b"\xa9", b"ab"]
    projection = VocabProjection.from_tokens(student, teacher, student_vocab=9, teacher_vocab=8)
    expected = torch.zeros(9, 8)
    expected[0, 1] = 1  # the lowest of two equal ones
    expected[1, 1], expected[1, 2] = 0.9 / 0.99, 0.09 / 0.99
    expected[2, 4], expected[2, 5] = 0.9 / 0.99, 0.09 / 0.99  # its two bytes
    expected[6, 0], expected[6, 1] = 0.9 / 0.99, 0.09 / 0.99
    expected[7, 2] = 1
    torch.testing.assert_close(dense(projection), expected)  # "x" cannot be written: no entry


def test_tokens_with_the_teachers_own_tokenizer():
    asked = []

    def encode(text):
        asked.append(text)
        return [0, 1, 0]

    projection = VocabProjection.from_tokens(["a", "cab"], ["a", "b"], encode=encode)
    assert asked == ["cab"]  # as it was given, and only where no text is equal
    whole = 0.9 + 0.09 + 0.009
    torch.testing.assert_close(
        dense(projection), torch.tensor([[1.0, 0.0], [0.909 / whole, 0.09 / whole]])
    )
    with pytest.raises(
        ValueError, match="needs vocabularies as large as the lists .* 2 and 2, got"
    ):
        VocabProjection.from_tokens(["a", "b"], ["a", "b"], student_vocab=1)
    with pytest.raises(ValueError, match="from_tokens needs at least 1 entry"):
        VocabProjection.from_tokens(["a"], ["b"])
    with pytest.raises(ValueError, match="from_tokens needs teacher tokens from 0 to 0, got 5"):
        VocabProjection.from_tokens(["a"], ["b"], encode=lambda text: [5])


def test_special_tokens_have_an_entry_of_their_own():
    student, teacher = ["a", None, "b"], ["b", "a", None, None]
    projection = VocabProjection.from_tokens(student, teacher, special={1: 3, 2: 2})
    assert torch.equal(
        dense(projection), torch.tensor([[0, 1.0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    )
    without = VocabProjection.from_tokens(student, teacher)
    assert not dense(without)[1].any()
    with pytest.raises(
        ValueError, match="from_tokens needs student tokens from 0 to 2, got 0 to 3"
    ):
        VocabProjection.from_tokens(student, teacher, special={3: 2})
    with pytest.raises(
        ValueError, match="from_tokens needs teacher tokens from 0 to 3, got 0 to 4"
    ):
        VocabProjection.from_tokens(student, teacher, special={1: 4})


@given(made=projections)
def test_topk_arrays_come_back(made):
    projection, matrix = made
    indices, weights = projection.to_topk()
    sizes = {"student_vocab": matrix.shape[0], "teacher_vocab": matrix.shape[1]}
    assert same(VocabProjection.from_topk(indices, weights, **sizes), projection)
    assert indices.shape[1] == projection.student_pointers.diff().max()
    assert (weights[:, :-1] >= weights[:, 1:]).all()
    few, less = projection.to_topk(2)
    assert few.shape == less.shape == (len(matrix), 2)
    assert torch.equal(few[:, : indices.shape[1]], indices[:, :2])
    largest = torch.nn.functional.pad(matrix, (0, 2)).topk(2).values
    assert torch.equal(less, largest)
    with pytest.raises(ValueError, match="to_topk needs k >= 1, got 0"):
        projection.to_topk(0)


def test_a_file_comes_back_and_is_read_anew_when_it_changed(tmp_path):
    path = tmp_path / "projection.safetensors"
    first, _ = random_projection(3, 6, 5, 2)
    first.save(path)
    assert same(VocabProjection.load(path), first)
    second, _ = random_projection(4, 6, 5, 2)
    second.save(str(path))
    assert same(VocabProjection.load(path), second)
    empty = first.rows(0, 0)
    empty.save(path)
    with pytest.raises(ValueError, match="VocabProjection.load needs at least 1 entry, got none"):
        VocabProjection.load(path)


def test_files_that_are_not_ours_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "projection.safetensors"
    with pytest.raises(
        FileNotFoundError, match="VocabProjection.load needs a file, and there is n"
    ):
        VocabProjection.load(path)
    for content in (b"", b"nothing of the kind" * 9):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="needs a file that save wrote, got"):
            VocabProjection.load(path)
    save_file({"student": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="its format is None, not 'termwise"):
        VocabProjection.load(path)
    projection, _ = random_projection(5, 3, 3, 2)
    projection.save(path)
    sizes = {"student_vocab": "3", "teacher_vocab": "3", "format": "termwise.lm.VocabProjection 1"}
    for changed, message in (
        ({"weight": load_file(path)["weight"].double()}, "its dtypes are"),
        ({"weight": load_file(path)["weight"][1:].contiguous()}, "its shapes are"),
        ({"teacher": load_file(path)["teacher"] + 9}, "needs teacher tokens from 0 to 2"),
        ({"weight": -load_file(path)["weight"]}, "finite and not negative"),
    ):
        tensors = {**load_file(path), **changed}
        other = tmp_path / "other.safetensors"
        save_file(tensors, other, metadata=sizes)
        with pytest.raises(ValueError, match=message):
            VocabProjection.load(other)


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    projection, _ = random_projection(6, 3, 3, 2)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # so that importing it fails
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = r'needs the package safetensors: pip install "termwise\[distill\]"'
    with pytest.raises(ImportError, match=f"VocabProjection.save {message}"):
        projection.save(tmp_path / "file")
    with pytest.raises(ImportError, match=f"VocabProjection.load {message}"):
        VocabProjection.load(tmp_path / "file")


def nemo(data, path, student_vocab=0, teacher_vocab=0):
    torch.save(data, path)
    return VocabProjection.load_nemo(path, student_vocab=student_vocab, teacher_vocab=teacher_vocab)


def test_both_formats_of_nemo_rl_are_read_anew_and_sized_by_the_larger(tmp_path):
    path = tmp_path / "projection.pt"
    topk = {
        "indices": torch.tensor([[2, 0], [1, -1], [-1, -1]]),
        "likelihoods": torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.0, 0.0]]),
        "model": "a name, which is left alone",
    }
    expected = torch.tensor([[0.25, 0, 0.75], [0, 1, 0]])
    found = nemo(topk, path)  # as large as its tokens ask: the empty third row asks nothing
    assert torch.equal(dense(found), expected)
    found = nemo(topk, path, 5, 4)
    assert torch.equal(dense(found)[:2, :3], expected)
    assert (found.student_vocab, found.teacher_vocab) == (5, 4)
    assert (nemo(topk, path, 1, 4).student_vocab, nemo(topk, path, 5, 2).teacher_vocab) == (2, 3)
    halves = {**topk, "likelihoods": topk["likelihoods"].half(), "indices": topk["indices"].int()}
    assert torch.equal(dense(nemo(halves, path)), expected)
    pairs = {(0, 2): 3, (4, 1): 0.5}  # the file changed on disk
    found = nemo(pairs, path, 2, 9)
    assert (found.student_vocab, found.teacher_vocab) == (5, 9)
    assert dense(found)[0, 2] == 3
    assert dense(found)[4, 1] == 0.5


class Crafted:
    """A pickle that runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_crafted_file_is_refused_and_runs_nothing(tmp_path):
    path, proof = tmp_path / "projection.pt", tmp_path / "it ran".replace(" ", "_")
    data = {"indices": torch.zeros(1, 1).long(), "likelihoods": torch.ones(1, 1)}
    torch.save({**data, "more": Crafted(proof)}, path)
    torch.load(path, weights_only=False)
    assert proof.exists()  # it does what it was made for
    proof.unlink()
    with pytest.raises(ValueError, match="of tensors and numbers alone, and runs no code from it"):
        VocabProjection.load_nemo(path, student_vocab=1, teacher_vocab=1)
    assert not proof.exists()


ALL = torch.ones(1, 1).expand(2**36, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "needs a dict"),
        ({"indices": torch.zeros(1, 1).long()}, "student token, teacher token"),
        ({(0, 1): "much"}, "student token, teacher token"),
        ({}, "at least 1 entry"),
        ({"indices": torch.zeros(2).long(), "likelihoods": torch.ones(2)}, "of one shape"),
        ({"indices": torch.ones(1, 1).bool(), "likelihoods": torch.ones(1, 1)}, "of one shape"),
        ({"indices": torch.ones(1, 1) * 1j, "likelihoods": torch.ones(1, 1)}, "of one shape"),
        ({"indices": torch.zeros(1, 1).long(), "likelihoods": torch.ones(1, 1) * 1j}, "of one"),
        (
            {"indices": torch.zeros(1, 1).long().expand(2**36, 1), "likelihoods": ALL},
            r"at most 16777216 rows, got \[68719476736, 1\]",
        ),
        ({"indices": torch.tensor([[2**40]]), "likelihoods": torch.ones(1, 1)}, "below 16777216"),
        ({(2**40, 0): 1.0}, "tokens below 16777216, got 1099511627776"),
        ({(2**70, 0): 1.0}, r"tokens that fit int64, got \(1180591620717411303424, 0\)"),
        ({(0, -(10**400)): 1.0}, r"tokens that fit int64, got \(0, -2\*\*1328 or more\)"),
        ({(0, 1): 10**400}, r"weights that fit float64, got 2\*\*1328 or more for \(0, 1\)"),
        ({"indices": torch.zeros(1, 2), "likelihoods": torch.ones(1, 2)}, "of one shape"),
        ({"indices": torch.full((1, 1), -1), "likelihoods": torch.ones(1, 1)}, "weight 0 where"),
        ({"indices": torch.full((1, 1), -2), "likelihoods": torch.ones(1, 1)}, "got -2 to -2"),
        ({(0, 1): float("nan")}, "finite and not negative, got nan"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, data, message):
    path = tmp_path / "projection.pt"
    with pytest.raises(ValueError, match=f"VocabProjection.load_nemo .*{message}.*{path}"):
        nemo(data, path, 1, 1)


def test_files_that_torch_cannot_read_are_refused(tmp_path):
    path = tmp_path / "projection.pt"
    with pytest.raises(FileNotFoundError, match="load_nemo needs a file, and there is none at"):
        VocabProjection.load_nemo(path, student_vocab=1, teacher_vocab=1)
    for content in (b"", b"text", b"PK\x03\x04 cut off"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="needs a file of tensors and numbers alone"):
            VocabProjection.load_nemo(path, student_vocab=1, teacher_vocab=1)


def test_directories_are_refused(tmp_path):
    projection, _ = random_projection(7, 3, 3, 2)
    named = f"VocabProjection.* needs .*{tmp_path}"
    with pytest.raises(ValueError, match=named):
        VocabProjection.load_nemo(tmp_path, student_vocab=1, teacher_vocab=1)
    with pytest.raises(ValueError, match=named):
        VocabProjection.load(tmp_path)
    with pytest.raises(ValueError, match=named):
        projection.save(tmp_path)


@pytest.mark.parametrize("size", ["-3", "16777217", str(10**400), "9" * 5000, "three", ""])
@pytest.mark.parametrize("side", ["student_vocab", "teacher_vocab"])
def test_files_of_absurd_sizes_are_refused(tmp_path, side, size):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "projection.safetensors"
    random_projection(8, 3, 3, 2)[0].save(path)
    sizes = {"student_vocab": "3", "teacher_vocab": "3", side: size}
    save_file(load_file(path), path, {"format": "termwise.lm.VocabProjection 1", **sizes})
    with pytest.raises(ValueError, match=f"load needs a file that save wrote, got {path}: "):
        VocabProjection.load(path)


def test_vocabularies_whose_pairs_cannot_be_counted_are_refused():
    huge = {"student_vocab": 2**40, "teacher_vocab": 2**40}
    with pytest.raises(
        ValueError, match=r"from_pairs needs vocabularies of less than 2\*\*63 pairs"
    ):
        VocabProjection.from_pairs({(0, 0): 1.0}, **huge)
    for pairs in ({(2**70, 0): 1.0}, {(0, 0): 10**400}):
        with pytest.raises(ValueError, match=r"^VocabProjection.from_pairs needs .* that fit"):
            VocabProjection.from_pairs(pairs, student_vocab=3, teacher_vocab=3)
