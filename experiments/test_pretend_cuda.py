"""The code for CUDA gives the CPU's tokens on a pretended GPU, which refuses what a GPU refuses."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cache import ROOM, Method
from experiments.pretend_cuda import pretended_cuda
from model_llava import VisionLanguageModel, load, open_image
from score_heads import OCR_PROMPT
from sparsemm import DEFAULT_MODEL, Conversation, GraphDecode, find_head_scores


def answers(name, method, device, questions=(OCR_PROMPT, "What is the Total?")):
    model = load(DEFAULT_MODEL.parent / name, device, "float32")
    assert model.device.type == device
    page = open_image(DEFAULT_MODEL.parent / "receipt.png")
    method = Method(method, 128, head_scores=find_head_scores(model))
    talk = Conversation(model, [page], method, max_new_tokens=ROOM + 10)
    return [(result["token_ids"], result["kept"]) for result in map(talk.ask, questions)]


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-next"])
@pytest.mark.parametrize("method", ["sparsemm", "full"])
def test_cuda_keeps_the_entries_and_gives_the_tokens_of_the_cpu(monkeypatch, name, method):
    on_cpu, steps, captures = answers(name, method, "cpu"), [], []
    call, capture = GraphDecode.__call__, GraphDecode.capture
    monkeypatch.setattr(GraphDecode, "__call__", lambda *a: steps.append(1) or call(*a))
    monkeypatch.setattr(GraphDecode, "capture", lambda *a: captures.append(1) or capture(*a))
    with pretended_cuda():
        assert answers(name, method, "cuda") == on_cpu
    assert len(on_cpu[0][0]) > ROOM and 3 <= len(captures) < len(steps) / 10       # the cache moved


def test_a_position_that_is_baked_into_the_graph_gives_wrong_tokens(monkeypatch):
    on_cpu, positions = answers("qwen2-vl", "full", "cpu", [OCR_PROMPT]), []
    call, decode = GraphDecode.__call__, VisionLanguageModel.decode
    monkeypatch.setattr(GraphDecode, "__call__", lambda self, token, position: (
        positions.append(position) or call(self, token, position)))
    monkeypatch.setattr(VisionLanguageModel, "decode", lambda self, token, position, attend: (
        decode(self, token, torch.full_like(position, positions[-1]), attend)))
    with pretended_cuda():
        (tokens, _), = answers("qwen2-vl", "full", "cuda", [OCR_PROMPT])
    assert tokens[:2] == on_cpu[0][0][:2] and tokens != on_cpu[0][0]


def test_a_replay_reads_tensors_anew_and_keeps_numbers():
    with pretended_cuda():
        x, n, graph = torch.ones(2, device="cuda"), 1, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = 2 * x + n
        assert y.is_cuda and y.isnan().all()                              # a capture runs nothing
        x, n = x.fill_(5), 100
        graph.replay()
        assert y.tolist() == [11, 11]


def test_tensors_of_two_devices_are_refused():
    with pretended_cuda():
        x, host = torch.ones(2, device="cuda"), torch.ones(2)
        assert not x.cpu().is_cuda and (x + x.new_tensor(1)).is_cuda and host.to(x).is_cuda
        assert (x * 2 + torch.tensor(1)).tolist() == [3, 3] == x.copy_(host + 2).tolist()
        for work in (lambda: x + host, lambda: torch.cat([x, host]), lambda: host[x.long()]):
            pytest.raises(RuntimeError, work).match("two devices")


@pytest.mark.parametrize("work", [
    lambda x: x.item(), lambda x: x.tolist(), lambda x: bool(x), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: torch.cuda.synchronize(), lambda x: x.cpu(),
    lambda x: x.to("cpu"), lambda x: torch.ones(1).to(x), lambda x: x.copy_(torch.ones(1)),
    lambda x: x.new_tensor([1]), lambda x: torch.as_tensor(1, device=x.device)])
def test_a_capture_refuses_to_wait_and_to_copy_from_the_host(work):
    with pretended_cuda():
        x = torch.ones(1, device="cuda")
        work(x)
        with pytest.raises(RuntimeError, match="stream"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work(x)
