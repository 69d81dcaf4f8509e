"""Call every function that torch lets a tensor override with a carrier, in several forms.

`python sweep_calls.py START STOP` makes all calls; with a third argument N, of each function the
first form and each N-th of the others. It prints the number of each function before it is called,
so that whoever runs this sees at which one the process died. A line that begins with "wrong" names
a call that went through and is not what reverse mode gives; what raises falls back, and is right.
"""

import sys
import warnings

import torch
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, resolve_name

from termwise.energy._forward_laplacian import Carrier, is_carrier

D = 4
OTHER = torch.tensor([[0.4, 1.3], [2.1, 0.7]], dtype=torch.float64)
INDEX = torch.tensor([[0, 1], [1, 1]])
MASK = torch.tensor([[True, False], [True, True]])
BESIDE = (  # which no tensor can override
    torch.as_tensor,
    torch.asarray,
    torch.tensor,
    torch.Tensor,
    torch.DoubleTensor,
    torch.from_dlpack,
    torch.scalar_tensor,
    torch.sparse_coo_tensor,
    torch.broadcast_shapes,
    nn.Parameter,
    nn.Buffer,
    Tensor.new,
    bool,
    float,
    list,
    len,
    repr,
    hash,
)
# What is in an empty tensor may be anything, and a carrier answers that it requires no gradient: it
# carries its derivatives, and wrappers that look for a graph shall find none.
SKIPPED = "empty_like", "new_empty", "empty", "requires_grad.__get__", "empty_strided"
# Called, so that the process is seen to live, and not compared: a hash is where an object lies in
# memory, which differs between any two calls.
IDENTITIES = {hash, Tensor.__hash__}
FORMS = {
    "f(h)": lambda f, h: f(h),
    "f(h, 2.0)": lambda f, h: f(h, 2.0),
    "f(2.0, h)": lambda f, h: f(2.0, h),
    "f(h, 1)": lambda f, h: f(h, 1),
    "f(h, h)": lambda f, h: f(h, h),
    "f(h, other)": lambda f, h: f(h, OTHER),
    "f(other, h)": lambda f, h: f(OTHER.clone(), h),
    "f(h, other=2.0)": lambda f, h: f(h, other=2.0),
    "f(input=h, dim=1)": lambda f, h: f(input=h, dim=1),
    "f(h, inplace=True)": lambda f, h: f(h, inplace=True),
    "f([h, other])": lambda f, h: f([h, OTHER]),
    "f(h, other, h)": lambda f, h: f(h, OTHER, h),
    "f(h, 1, index)": lambda f, h: f(h, 1, INDEX),
    "f(h, 0, index, h)": lambda f, h: f(h, 0, INDEX, h),
    "f(h, (2, 2))": lambda f, h: f(h, (2, 2)),
    "f(h, mask)": lambda f, h: f(h, MASK),
    "f(h, dtype)": lambda f, h: f(h, torch.float32),
    "f(mask, h, 0.5)": lambda f, h: f(MASK, h, 0.5),
    "f(h, out=)": lambda f, h: f(h, out=OTHER.clone()),
}


def name_of(function):
    return resolve_name(function) or repr(function)


def functions():
    found = {}
    for group in get_overridable_functions().values():
        found.update(dict.fromkeys(group))
    return [*found, *BESIDE]


def numbers(result, h):
    """Return what there is in a result, and what became of the argument."""
    if isinstance(result, Tensor):
        if result.is_complex():
            return [result.real, result.imag]
        return [result if result.is_floating_point() else result.detach().double()]
    if isinstance(result, (tuple, list)):
        return [part for item in result for part in numbers(item, None)]
    if isinstance(result, (bool, int, float)):
        return [torch.tensor(float(result))]
    return []


def energy_of(function, form):
    def energy(h):
        torch.default_generator.manual_seed(0)  # torch.manual_seed looks at the stack first
        result = form(function, h)
        if function in IDENTITIES or not isinstance(
            result, (Tensor, tuple, list, bool, int, float)
        ):
            result = None
        total = 0.0
        for part in (*numbers(result, h), h):
            total = total + (part * (part + 0.7)).sum().double()
        return total

    return energy


def by_reverse(energy, h):
    x = h.flatten().requires_grad_()
    value = energy(x.reshape(2, 2) * 1)  # which may be written to, unlike a leaf
    (score,) = torch.autograd.grad(value, x, create_graph=True)
    rows = [torch.autograd.grad(score[i], x, retain_graph=True)[0][i] for i in range(D)]
    return value, score, sum(rows)


def problem_of(function, form):
    """Return what is wrong with a call, or "": it is right, or falls back."""
    energy = energy_of(function, form)
    h = torch.tensor([[0.5, 0.8], [1.4, 1.1]], dtype=torch.float64)
    base = torch.eye(D, dtype=h.dtype).reshape(D, 2, 2)
    try:
        carrier = energy(Carrier(h.clone(), base, None, None, None, False, False))
    except Exception:
        return ""
    if not is_carrier(carrier) or not carrier.value.isfinite().all():
        return ""  # where the energy is no number, nothing passes for one
    try:
        expected = by_reverse(energy, h)
    except Exception:
        return ""  # torch does not differentiate it: the call is no energy
    laplacian = 0 * carrier.value if carrier.laplacian is None else carrier.laplacian
    ours = carrier.value, carrier.jacobian, laplacian
    for part, of_reverse in zip(ours, expected, strict=True):
        # A conversion on the way is as exact as its dtype.
        exact = 1e-1 if name_of(function).endswith(("half", "bfloat16")) else 1e-5
        if not torch.allclose(part, of_reverse, rtol=exact, atol=exact, equal_nan=True):
            return f"{part.tolist()} for {of_reverse.tolist()}"
    return "right"


def main(start, stop, stride=1):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    right = 0
    for i, function in enumerate(functions()[start:stop], start):
        name = name_of(function)
        print(i, name, flush=True)
        for k, (written, form) in enumerate(FORMS.items()):
            if (k and (i + k) % stride) or name.endswith(SKIPPED):
                continue
            problem = problem_of(function, form)
            right += problem == "right"
            if problem not in ("", "right"):
                print("wrong", name, written, problem, flush=True)
    print("right", right)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
