"""Gradients of two processes, averaged through memory that they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from forked import run_ranks

pytestmark = pytest.mark.slow

BEGINNING = """
import os, resource, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel, GPT2Config, GPT2LMHeadModel
from tiny_models import TINY
from hftl.exchange import GradientExchange, _shared_memory, gradient_exchange
from hftl.word_rows import WordRows

dist.init_process_group("gloo")
rank = dist.get_rank()

def model_of(name):
    torch.manual_seed(0)
    return TINY[name]()

def backward(model):
    words = torch.randint(5, 25, (3, 7), generator=torch.Generator().manual_seed(rank))
    model(input_ids=words).logits.square().sum().backward()

def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters()}
"""


def two_processes(place: Path, script: str) -> None:
    """Run what asserts; each process sees the other's gradients alone through what is tested."""
    (place / "ranks.py").write_text(BEGINNING + script + '\nprint("done")\n')
    environment = {"PYTHONPATH": str(Path(tiny_models.__file__).parent)}
    for done in run_ranks(["ranks.py"], place, **environment):
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("done\n")


def test_averages_are_those_of_distributed_data_parallel_to_the_bit(tmp_path: Path) -> None:
    script = """
theirs, ours = model_of("bert").eval(), model_of("bert").eval()
backward(DistributedDataParallel(theirs, find_unused_parameters=True))
with gradient_exchange(ours) as exchange:
    assert ours.bert.embeddings.word_embeddings.sparse
    distributed = DistributedDataParallel(ours)
    for _ in range(2):  # the memory is used again
        ours.zero_grad()
        with distributed.no_sync():
            backward(distributed)
        words = ours.bert.embeddings.word_embeddings.weight
        assert words.grad.is_sparse
        exchange.average()
        assert words.grad.is_sparse
    for weight, same in zip(ours.parameters(), theirs.parameters(), strict=True):
        if weight is not words and weight.grad is not None:
            assert weight.grad.equal(same.grad)
    norm = exchange.words.clip(lambda weights: nn.utils.clip_grad_norm_(weights, 0.01))
assert not ours.bert.embeddings.word_embeddings.sparse
assert not words.grad.is_sparse
expected = nn.utils.clip_grad_norm_([w for w in theirs.parameters() if w.grad is not None], 0.01)
assert norm > 0.01
torch.testing.assert_close(norm, expected)
ours, theirs = gradients(ours), gradients(theirs)
for name, gradient in theirs.items():
    if gradient is None:
        assert ours[name] is None, name
    else:
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=0, msg=name)
"""
    two_processes(tmp_path, script)


def test_a_gradient_that_some_processes_lack_counts_as_zeros_there(tmp_path: Path) -> None:
    script = """
weights = [nn.Parameter(torch.zeros(3, size)) for size in (1, 5, 2)]
for dense in (False, True):
    words = nn.Parameter(torch.zeros(4, 2))
    for weight in weights:
        weight.grad = None
    exchange = GradientExchange(weights, WordRows(words, weights), _shared_memory(24))
    weights[0].grad = torch.full((3, 1), 2.0 + rank)
    if rank:
        weights[1].grad = torch.arange(15.0).view(3, 5)
        words.grad = torch.sparse_coo_tensor([[3, 1, 3]], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], (4, 2))
    elif dense:
        words.grad = torch.ones(4, 2)
    exchange.average()
    norm = exchange.words.clip(lambda given: nn.utils.clip_grad_norm_(given, 1e9))
    assert weights[0].grad.tolist() == [[2.5]] * 3
    assert weights[1].grad.equal(torch.arange(15.0).view(3, 5) / 2)
    assert weights[2].grad is None
    expected = torch.tensor([[0, 0], [3, 4], [0, 0], [6, 8.0]]) / 2 + (0.5 if dense else 0)
    assert words.grad.equal(expected), words.grad
    parts = [weights[0].grad, weights[1].grad, expected]
    torch.testing.assert_close(norm, torch.cat([part.flatten() for part in parts]).norm())
"""
    two_processes(tmp_path, script)


def test_who_exchanges_through_memory(tmp_path: Path) -> None:
    script = """
def exchanged(model):
    with gradient_exchange(model) as exchange:
        embeddings = [part for part in model.modules() if getattr(part, "sparse", False)]
        assert len(embeddings) == (exchange is not None and exchange.words is not None)
        return None if exchange is None else exchange.words is not None

assert exchanged(model_of("bert")) is True
assert exchanged(model_of("vit")) is False  # no words
assert exchanged(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20))) is False  # tied
frozen = model_of("bert")
frozen.get_input_embeddings().requires_grad_(False)
assert exchanged(frozen) is False
assert exchanged(nn.Embedding(20, 8)) is False
assert exchanged(model_of("timm_resnet18")) is None  # buffers of BatchNorm
assert exchanged(model_of("bert").double()) is None
by_number = model_of("bert")
by_number.get_input_embeddings().scale_grad_by_freq = True
assert exchanged(by_number) is False
own = model_of("bert")
own.bert.embeddings.position_embeddings.sparse = True
with gradient_exchange(own) as exchange:
    assert exchange is None
with gradient_exchange(model_of("bert"), words_by_rows=False) as exchange:
    assert exchange.words is None
may_open, make = os.access, os.memfd_create
os.access = lambda path, mode: rank == 0
assert exchanged(model_of("bert")) is None
os.access = may_open
def forbidden(name):
    raise PermissionError(name)
os.memfd_create = forbidden
assert exchanged(model_of("bert")) is None
os.memfd_create = make
for limit, ranks in ((resource.RLIMIT_NOFILE, (1,)), (resource.RLIMIT_FSIZE, (0, 1))):
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (3 if rank in ranks else soft, hard))
    assert exchanged(model_of("bert")) is None
    resource.setrlimit(limit, (soft, hard))
assert exchanged(model_of("bert")) is True
os.environ["LOCAL_WORLD_SIZE"] = "1"  # of two machines
assert exchanged(model_of("bert")) is None
"""
    two_processes(tmp_path, script)


def test_the_memory_ends_with_the_training(tmp_path: Path) -> None:
    script = """
from pathlib import Path
before = len(os.listdir("/proc/self/fd"))
with gradient_exchange(model_of("bert")) as exchange:
    assert len(os.listdir("/proc/self/fd")) == before
    assert "hftl-gradients" in Path("/proc/self/maps").read_text()
del exchange
assert "hftl-gradients" not in Path("/proc/self/maps").read_text()
"""
    two_processes(tmp_path, script)
