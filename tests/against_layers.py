"""Fused kernels against the plain layers in float64: one line of JSON for each network.

Run by test_kernels.py in a process of its own, since Triton decides when it is imported whether
its kernels run on a GPU or, slowly, on the CPU.
"""

import json
import sys
from dataclasses import replace

import torch

from x3mat.model import X3Mat, X3MatConfig, window_graph
from x3mat.training import Flat
from x3mat_gcmc.lattice_gas import ToldX3Mat


def random_windows(counts: list[int], radius: float) -> tuple[torch.Tensor, ...]:
    n = sum(counts)
    positions = torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=1)
    positions *= radius * torch.rand(n, 1, dtype=torch.float64) ** (1 / 3)
    turned = positions @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    species = torch.randint(1, 20, (n,))  # each window twice, so that pairs recur
    ptr = torch.tensor([0, *counts, *counts]).cumsum(0)
    return torch.cat([positions, turned]), torch.cat([species, species]), ptr


def main(device: str) -> None:
    some, none = [6, 0, 1, 2, 7], [0, 0]
    cases = [(2, 2, 2, some), (1, 1, 1, some), (0, 0, 2, some), (2, 2, 3, none)]
    cases += [(4, 2, 3, some), (6, 2, 2, some)] * (device != "cpu")
    for l_max, m_max, layers, counts in cases:
        torch.manual_seed(l_max)
        config = X3MatConfig(l_max=l_max, m_max=m_max, layers=layers, channels=16, cutoff=2.5,
                             radius=3.0)
        model = (ToldX3Mat if l_max == 1 else X3Mat)(config).double().to(device)
        for p in model.parameters():
            if p.ndim == 1 or not p.any():  # biases, and the last weights of some, begin at zero
                p.data += 0.1 * torch.randn_like(p)
        model.degree[:] = 4.0
        exact = window_graph(*random_windows(counts, 3.0), 2.5, 3.0)
        exact = replace(exact.to(device), kind=None, first=None)
        if l_max == 1:  # windows that share atoms, in which a pair may be an atom and its image
            n = len(exact.species)
            vector = torch.randn(len(exact.src), 3, dtype=torch.float64, device=device)
            told = torch.randn(exact.n_windows, 1 + model.standard.shape[1]).to(vector)
            exact = replace(exact, atom=torch.randint(0, n, (n,), device=device), vector=vector,
                            told=told)
        share = torch.randn(exact.n_windows, 1, dtype=torch.float64, device=device)
        y = model.plain_network(exact, model.plain_geometry(exact))
        (y * share).sum().backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters()}
        model = model.float()
        model.zero_grad()
        graph = replace(exact, **{k: x.float() for k, x in vars(exact).items()
                                  if isinstance(x, torch.Tensor) and x.is_floating_point()})
        if l_max > 1:
            graph = graph.with_kinds()
            assert len(graph.first) <= 0.75 * len(graph.src)
        assert model._kernels(graph.positions) is not None
        z = model.network(graph)
        (z * share.float()).sum().backward()
        errors = {n: float((p.grad - expected[n]).norm() / expected[n].norm().clamp(min=1e-6))
                  for n, p in model.named_parameters()}
        if l_max == 1:  # weights that are parts of a vector, as in training
            order = torch.cat([expected[n].flatten() for n, _ in model.named_parameters()])
            flat = Flat(model)
            (flat.network(graph) * share.float()).sum().backward()
            errors["vector"] = float((flat.vector.grad - order).norm() / order.norm())
        print(json.dumps({"l_max": l_max, "output": float((z - y).abs().max() / y.abs().max()),
                          "gradient": max(errors.values())}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
