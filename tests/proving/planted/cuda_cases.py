"""Calls of the planted CUDA kernels, by test_proving.py and, under the sanitizers, in processes of their own."""

import numpy as np

from tests.proving import cudahost


def kernels() -> cudahost.Kernels:
    names = "rowsum sum_warps read_uninitialised deadlock neighbours broadcast count sum_last_block cluster_sum"
    return cudahost.load("tests/proving/planted/kernels.cu", [f"planted::{name}" for name in names.split()])


def rowsum(bug: str, rows: str = "3", columns: str = "1000", threads: str = "256") -> None:
    x = np.random.default_rng(0).standard_normal((int(rows), int(columns)), dtype=np.float32)
    out = np.full(int(rows), np.nan, np.float32)
    kernels().rowsum(int(bug), x, out, int(rows), int(columns), False, int(threads))
    if bug == "0":
        np.testing.assert_allclose(out, x.sum(1), rtol=1e-4, atol=1e-4)


def sum_warps(kind: str, threads: str = "64") -> None:
    x, out = np.arange(int(threads), dtype=np.float32), np.zeros(int(threads) // 32, np.float32)
    kernels().sum_warps(int(kind), x, out, int(threads))
    if kind == "0":
        assert out.sum() == 2 * x.sum()


def past_shared_memory() -> None:
    kernels().read_uninitialised(np.zeros(64, np.float32), 64, True)


def cluster_sum(bug: str = "0", clusters: str = "3", blocks: str = "8") -> None:
    numbers = np.full((int(clusters), int(blocks)), -1, np.int32)
    sums = np.full((*numbers.shape, 32), -1, np.int32)
    kernels().cluster_sum(int(bug), numbers, sums, int(clusters), int(blocks))
    assert (sums == int(blocks) * (int(blocks) + 1) // 2).all()
