"""Benchmarks of fastreg beside every peer that is installed, and the long-tail comparison on real images.

    python -m benchmarks              times every op, writes <op>.csv and <op>.png, prints a table (--help for options)
    python -m benchmarks.longtail     trains a small network on long-tailed images with every method of the library

How to add an op: write `bench_<op>.py` with one or more `Bench` objects; the driver finds them.

    group_norm = Bench("group_norm", cases={"8x64x56x56": (8, 64, 56, 56)}, quick=("8x64x56x56",))

    @group_norm.inputs                          # built once per case and dtype, shared by all providers
    def inputs(shape, dtype, device):
        return SimpleNamespace(x=torch.randn(shape, dtype=dtype, device=device, requires_grad=True))

    @group_norm.bytes                           # the least that any implementation has to move, per mode
    def least_bytes(data):
        return {"forward": 2 * nbytes(data.x), "backward": 3 * nbytes(data.x)}

    @group_norm.ours                            # timed as it comes, and once per backend that serves the op here
    def ours(data):
        return differentiable(lambda: fastreg.group_norm(data.x, 32), data.x)

    @group_norm.peer("torch eager")             # the first peer is the one that results are compared with
    def eager(data):
        return differentiable(lambda: F.group_norm(data.x, 32), data.x)

    @group_norm.peer("some package", needs="some_package", devices=("cuda",))
    def other(data):
        import some_package                     # not installed or wrong device: left out, with the reason in the CSV
        ...

A provider returns the calls to time by mode: `differentiable` gives forward, backward and both; an op without
gradient returns `{"update": Run(call, before=reset)}`, where `before` runs untimed ahead of every timed call. It may
raise `LeftOut("why")`. The measuring itself, and what it guards against, is described in timing.py.
"""
