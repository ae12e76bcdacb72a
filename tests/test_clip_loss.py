"""clip_loss against open_clip's, and over two processes against one."""

from __future__ import annotations

import resource

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from eva02_kernels import clip_loss

open_clip_loss = pytest.importorskip("open_clip.loss")
PAIRS, WIDTH, PROCESSES = 6, 20, 2


def _pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(PAIRS, WIDTH, generator=generator), dim=-1) for _ in range(2))
    return image, text, torch.tensor(8.0)


def _gradients(loss, image, text, scale) -> list[torch.Tensor]:
    leaves = [t.clone().requires_grad_() for t in (image, text, scale)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_equals_open_clip(backend, cpu_library):
    expected = _gradients(open_clip_loss.ClipLoss(), *_pairs())
    found = _gradients(lambda *leaves: clip_loss(*leaves, backend=backend), *_pairs())
    torch.testing.assert_close(found, expected)


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    image, text, scale = _pairs()
    own = slice(rank * PAIRS // PROCESSES, (rank + 1) * PAIRS // PROCESSES)
    ours = {
        # Each process weighs the loss in its own way, and the weights' sum is 1.
        f"{backend}, weighed": lambda *leaves, b=backend: (
            (2 * rank + 1) / 4 * clip_loss(*leaves, group=dist.group.WORLD, backend=b)
        )
        for backend in ("cpu", "eager")
    }
    ours["cpu"] = lambda *leaves: clip_loss(*leaves, group=dist.group.WORLD)
    ours["compiled"] = torch.compile(ours["cpu"], backend="aot_eager", fullgraph=True)
    ours["open_clip"] = open_clip_loss.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=PROCESSES)
    torch.save({name: _gradients(f, image[own], text[own], scale) for name, f in ours.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path, cpu_library):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=PROCESSES)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    loss, *grads = _gradients(clip_loss, *_pairs())
    for rank in ranks:
        torch.testing.assert_close(rank["cpu"][0], loss)
    for name in ranks[0]:
        total = 1.0 if "weighed" in name else float(PROCESSES)
        image, text = (torch.cat([rank[name][i] for rank in ranks]) / total for i in (1, 2))
        scale = sum(rank[name][3] for rank in ranks) / total
        torch.testing.assert_close([image, text, scale], grads, msg=lambda text, name=name: f"{name}: {text}")


def test_errors_name_the_argument():
    image, text, scale = _pairs()
    for argument, arguments in {
        "image": (image[0], text[0], scale),
        "text": (image, text[:3], scale),
        "logit_scale": (image, text, torch.ones(2)),
    }.items():
        with pytest.raises(ValueError, match=f"{argument}: expected"):
            clip_loss(*arguments)


def _peak(queue, pairs: int) -> None:
    image, text = (F.normalize(torch.randn(pairs, 8), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(8.0, requires_grad=True)
    clip_loss(image[:64], text[:64], scale, backend="cpu").backward()  # what libraries keep for themselves
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clip_loss(image, text, scale, backend="cpu").backward()
    queue.put(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_memory_is_linear_in_the_batch(cpu_library):
    """Forward and backward of a batch whose similarities take 256 MiB."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_peak, args=(queue, 8192))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert queue.get() < 8192 * 8192 * 4 / 4
