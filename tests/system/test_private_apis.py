"""Private interfaces of torch, timm and huggingface_hub that the package relies on, each with the file that uses it.

A failure here names what a new version of a library has changed, and where to look. Settings of torch's compiler are in
tests/runtime/test_compiler.py, typer's in tests/cli/test_options.py.
"""

from __future__ import annotations

import inspect
import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def test_in_place_operations_raise_the_version_of_a_tensor() -> None:
    """matching/trace.py: `Tensor._version` tells whether a tensor was overwritten after a hook, on any device."""
    for device in ("cpu", "meta"):
        tensor = torch.zeros(2, device=device)
        before = tensor._version
        tensor + 1
        assert tensor._version == before
        tensor.add_(1)
        assert tensor._version == before + 1


def test_all_moves_of_a_module_go_through_apply() -> None:
    """api.py: `nn.Module._apply(fn, recurse)` is what `to`, `half`, `cuda` and their like call."""

    class Watched(nn.Linear):
        calls = 0

        def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
            type(self).calls += 1
            return super()._apply(fn, recurse)

    module = Watched(2, 2)
    for move in (lambda: module.to("meta"), lambda: module.half(), lambda: module.to_empty(device="cpu")):
        before = Watched.calls
        move()
        assert Watched.calls > before


def test_all_batch_norms_have_one_base_class() -> None:
    """runtime/batch_norm.py: `_BatchNorm` is the base of torch's and timm's batch norms, with these attributes."""
    for norm in (nn.BatchNorm1d(3), nn.BatchNorm2d(3), BatchNormAct2d(3)):
        assert isinstance(norm, _BatchNorm)
        assert {"num_batches_tracked", "running_mean", "running_var"} <= set(dict(norm.named_buffers()))
        assert {"momentum", "eps", "affine", "track_running_stats", "training"} <= set(vars(norm))
    assert isinstance(BatchNormAct2d(3).act, nn.Module) and isinstance(BatchNormAct2d(3).drop, nn.Module)


def test_the_class_of_a_module_can_be_exchanged() -> None:
    """runtime/batch_norm.py: assigning `module.__class__` keeps parameters, buffers and hooks, and changes forward."""

    class Other(_BatchNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input + 1

    calls: list[object] = []
    norm: nn.Module = nn.BatchNorm2d(3)
    norm.register_forward_hook(lambda *_: calls.append(None))
    state = {name: id(value) for name, value in norm.state_dict(keep_vars=True).items()}
    norm.__class__ = Other
    assert torch.equal(norm(torch.zeros(1, 3, 2, 2)), torch.ones(1, 3, 2, 2)) and len(calls) == 1
    assert {name: id(value) for name, value in norm.state_dict(keep_vars=True).items()} == state


def test_a_dispatch_mode_sees_every_operator() -> None:
    """commands/doctor/trial.py: `torch.utils._python_dispatch.TorchDispatchMode`, also in backward."""
    mode = import_module("torch.utils._python_dispatch").TorchDispatchMode
    seen: list[str] = []

    class Watch(mode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    weight = torch.ones(2, 2, requires_grad=True)
    with Watch():
        torch.mm(weight, weight).sum().backward()
    assert seen.count("aten.mm.default") == 3, "one in forward, two in backward"


def test_tensors_in_nested_arguments_are_leaves() -> None:
    """commands/doctor/trial.py: `torch.utils._pytree.tree_leaves`."""
    leaves = import_module("torch.utils._pytree").tree_leaves
    a, b = torch.ones(1), torch.ones(2)
    assert [id(leaf) for leaf in leaves(([a, {"x": b}], {})) if isinstance(leaf, torch.Tensor)] == [id(a), id(b)]


def test_views_share_the_identity_of_their_storage() -> None:
    """commands/doctor/trial.py: `UntypedStorage._cdata` is one number for all views of a tensor, another for copies."""
    tensor = torch.ones(4)
    own = tensor.untyped_storage()._cdata
    assert tensor[1:].untyped_storage()._cdata == own and tensor.view(2, 2).untyped_storage()._cdata == own
    assert tensor.clone().untyped_storage()._cdata != own


def test_timm_writes_a_configuration_without_weights(tmp_path: Path) -> None:
    """commands/export/hub.py: `timm.models._hub.save_config_for_hf`."""
    save_config = import_module("timm.models._hub").save_config_for_hf
    model = timm.create_model("test_resnet", num_classes=2)
    config = {"label_names": ["a", "b"], "pretrained_cfg": {"tag": "x", "license": "mit"}}
    save_config(model, tmp_path / "config.json", model_config=config, data_config={"input_size": (3, 48, 40)})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architecture"] == "test_resnet" and written["label_names"] == ["a", "b"]
    assert written["pretrained_cfg"]["tag"] == "x" and written["pretrained_cfg"]["input_size"] == [3, 48, 40]


def test_names_of_repositories_are_validated() -> None:
    """commands/export/hub.py: `huggingface_hub.utils.validate_repo_id`, documented but not in `__all__`."""
    validate = import_module("huggingface_hub.utils").validate_repo_id
    error = import_module("huggingface_hub.errors").HFValidationError
    validate("me/student")
    validate("student")
    for name in ("not a name", "a/b/c", ""):
        with pytest.raises(error):
            validate(name)


@pytest.mark.parametrize(("reader", "package"), [("wds", "webdataset"), ("hfids", "datasets")])
def test_a_streaming_reader_builds_its_pipeline_if_it_has_none(reader: str, package: str) -> None:
    """data/timm_dataset.py: `reader.ds = reader.worker_info = None` makes timm's reader start anew."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    module = import_module(f"timm.data.readers.reader_{reader}")
    cls = next(value for name, value in vars(module).items() if name.lower() == f"reader{reader}")
    assert "self.worker_info = None" in inspect.getsource(cls.__init__), "the reader begins without them"
    assert "if self.ds is None:" in inspect.getsource(cls.__iter__), "an epoch builds the pipeline if there is none"
    assert "if self.worker_info is None:" in inspect.getsource(cls), "and with it the share of the worker"


def test_streaming_readers_can_leave_images_encoded() -> None:
    """data/sources: webdataset.py replaces the `Image` of a reader, hugging_face.py calls `_lazy_init` of another."""
    pytest.importorskip("datasets")
    shards, stream = (import_module(f"timm.data.readers.reader_{name}") for name in ("wds", "hfids"))
    text = inspect.getsource(shards._decode)
    assert text.count("Image.") == 1 and "img = Image.open(b)" in text and "img.load()" in text
    text = inspect.getsource(stream.ReaderHfids)
    assert "if self.ds is None:\n            self._lazy_init()" in text and "input_data: Image.Image = sample[" in text
