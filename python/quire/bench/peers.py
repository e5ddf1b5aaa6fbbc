# SPDX-License-Identifier: Apache-2.0
"""The peers that `quire bench` finds installed. Each turns a case into a call, or into None where
it has nothing for it. None is needed by quire: they are imported by name, if at all."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from .cases import Array, Backward, Case, Decode, Prefill

Call = Callable[[], object]
# A call, and what makes an array like quire's result of what it returns.
Candidate = tuple[Call, Callable[[Any], Array]]


class Torch:
    """`scaled_dot_product_attention`; paged: after gathering each sequence's blocks."""

    name = "torch"
    needs = ("torch",)

    def __init__(self, threads: int) -> None:
        """Sets torch's threads for the process."""
        self.torch = import_module("torch")
        self.torch.set_num_threads(threads)
        self.version = self.torch.__version__

    def prepare(self, case: Case) -> Candidate | None:
        """The case for torch."""
        if isinstance(case, Prefill):
            return self._prefill(case)
        return self._decode(case) if isinstance(case, Decode) else None

    def _tensor(self, array: Array) -> Any:
        if array.dtype.name != "bfloat16":
            return self.torch.from_numpy(array)
        return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)

    def _attend(self, q: Any, k: Any, v: Any, causal: bool) -> Any:
        attend = self.torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, is_causal=causal, enable_gqa=True)

    @staticmethod
    def _array(result: Any) -> Array:
        return np.asarray(result.float())

    def _prefill(self, case: Prefill) -> Candidate:
        q, k, v = [self._tensor(x).transpose(1, 2).contiguous() for x in case.tensors]
        if not isinstance(case, Backward):
            return lambda: self._attend(q, k, v, True).transpose(1, 2), self._array
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = self._attend(q, k, v, True)
        dout = self._tensor(case.dout).transpose(1, 2).contiguous()

        def run() -> Any:
            gradients = self.torch.autograd.grad(out, inputs, dout, retain_graph=True)
            return gradients[0].transpose(1, 2)

        return run, self._array

    def _decode(self, case: Decode) -> Candidate:
        q, k_cache, v_cache = (self._tensor(x) for x in (case.q, case.k_cache, case.v_cache))
        block_size, lengths = case.k_cache.shape[1], case.seq_lens.tolist()
        tables = [
            self.torch.from_numpy(row[: -(-n // block_size)])
            for row, n in zip(case.block_table, lengths, strict=True)
        ]

        def gathered(cache: Any, b: int) -> Any:
            rows = cache.index_select(0, tables[b]).flatten(0, 1)[: lengths[b]]
            return rows.transpose(0, 1)[None]

        def run() -> Any:
            rows = [
                self._attend(q[b][None, :, None], gathered(k_cache, b), gathered(v_cache, b), False)
                for b in range(len(lengths))
            ]
            return self.torch.cat(rows)[:, :, 0]

        return run, self._array


class Jax:
    """`jax.nn.dot_product_attention`, compiled; it takes its own number of threads."""

    name = "jax"
    needs = ("jax",)

    def __init__(self, threads: int) -> None:
        """On the CPU, whatever other devices there are."""
        self.jax = import_module("jax")
        self.jax.config.update("jax_platforms", "cpu")
        self.version = self.jax.__version__

    def prepare(self, case: Case) -> Candidate | None:
        """Prefill in the types that it takes on the CPU."""
        if not isinstance(case, Prefill) or isinstance(case, Backward) or case.dtype == "float16":
            return None
        q, k, v = (self.jax.numpy.asarray(x) for x in case.tensors)
        attend = self.jax.jit(
            lambda q, k, v: self.jax.nn.dot_product_attention(q, k, v, is_causal=True)
        )
        return lambda: attend(q, k, v).block_until_ready(), lambda x: np.asarray(x, np.float32)


class OnnxRuntime:
    """The operator GroupQueryAttention."""

    name = "onnxruntime"
    needs = ("onnxruntime", "onnx")

    def __init__(self, threads: int) -> None:
        """A session has that many threads."""
        self.runtime = import_module("onnxruntime")
        self.onnx = import_module("onnx")
        self.threads = threads
        self.version = self.runtime.__version__

    def prepare(self, case: Case) -> Candidate | None:
        """Prefill in the types that it takes on the CPU."""
        if not isinstance(case, Prefill) or isinstance(case, Backward) or case.dtype == "bfloat16":
            return None
        q, k, v = case.tensors
        length = q.shape[1]
        past = np.zeros((1, k.shape[2], length, k.shape[3]), k.dtype)
        feeds: dict[str, Array] = {
            x: y.reshape(1, length, -1) for x, y in zip("qkv", (q, k, v), strict=True)
        }
        feeds |= {"past_k": past, "past_v": past.copy()}
        feeds["last"] = np.array([length - 1], np.int32)
        feeds["total"] = np.array(length, np.int32)
        session = self._session(case)
        binding = session.io_binding()
        values = {n: self.runtime.OrtValue.ortvalue_from_numpy(x) for n, x in feeds.items()}
        values["out"] = self.runtime.OrtValue.ortvalue_from_numpy(np.empty_like(feeds["q"]))
        for name in feeds:
            binding.bind_ortvalue_input(name, values[name])
        for name, value in (("out", "out"), ("new_k", "past_k"), ("new_v", "past_v")):
            binding.bind_ortvalue_output(name, values[value])
        return (
            lambda: session.run_with_iobinding(binding),
            lambda _: values["out"].numpy().reshape(q.shape),
        )

    def _session(self, case: Prefill) -> Any:
        proto, helper = self.onnx.TensorProto, self.onnx.helper
        kind = proto.FLOAT if case.dtype == "float32" else proto.FLOAT16
        q, k, _ = case.tensors
        floats, integers = ["q", "k", "v", "past_k", "past_v"], ["last", "total"]
        outputs = ["out", "new_k", "new_v"]
        node = helper.make_node(
            "GroupQueryAttention",
            floats + integers,
            outputs,
            domain="com.microsoft",
            num_heads=q.shape[2],
            kv_num_heads=k.shape[2],
        )
        graph = helper.make_graph(
            [node],
            "attention",
            [helper.make_tensor_value_info(n, kind, None) for n in floats]
            + [helper.make_tensor_value_info(n, proto.INT32, None) for n in integers],
            [helper.make_tensor_value_info(n, kind, None) for n in outputs],
        )
        versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, ir_version=9, opset_imports=versions)
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return self.runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


Peer = Torch | Jax | OnnxRuntime
ALL: tuple[type[Peer], ...] = (Torch, OnnxRuntime, Jax)


def installed(threads: int) -> list[Peer]:
    """The peers whose modules are there."""
    return [peer(threads) for peer in ALL if all(find_spec(module) for module in peer.needs)]
