from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from gradbench.backbones import Backbone, Timm, split_name
from gradbench.errors import BackboneError
from gradbench.model import Features, initialised_from, weights_digest
from gradbench.task import Input

RGB = Input(channels=3, size=32)
MODELS = [
    "test_vit",
    "resnet18",
    "convnext_atto",
    "mobilenetv3_small_050",
    "test_efficientnet",
    "test_mambaout",
    "swin_tiny_patch4_window7_224",
]


def create(name: str, spec: Input = RGB, weights: str = "none", seed: int = 0) -> Backbone:
    with initialised_from(seed):
        return Timm().create(name, spec, weights)


def images(spec: Input = RGB) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, spec.channels, spec.size, spec.size, generator=generator)


def features(made: Backbone, spec: Input = RGB) -> Features:
    with torch.no_grad():
        found: Features = made.module.eval()(images(spec))
    return found


def maps_of(made: Backbone, spec: Input) -> Tensor:
    model: Any = made.module.get_submodule("model").eval()
    with torch.no_grad():
        maps: Tensor = model.forward_features(images(spec))
    return maps


class TestCreate:
    @pytest.mark.parametrize("name", MODELS)
    def test_features_have_the_width_that_is_said(self, name: str) -> None:
        made = create(name)
        pooled, tokens = features(made)
        assert pooled.shape == (2, made.width)
        assert tokens.dim() == 3
        assert len(tokens) == 2
        assert bool(pooled.isfinite().all())

    @pytest.mark.parametrize(
        ("name", "count", "channels"),
        [
            ("test_vit", 1 + 4 * 4, 64),  # a class token, and 16 of 16×16 pixels
            ("resnet18", 2 * 2, 512),
            ("mobilenetv3_small_050", 2 * 2, 288),
            ("test_mambaout", 2 * 2, 64),  # its maps have channels last
        ],
    )
    def test_tokens_are_the_positions(self, name: str, count: int, channels: int) -> None:
        spec = Input(channels=3, size=64)
        made = create(name, spec)
        assert features(made, spec).tokens.shape == (2, count, channels)

    def test_tokens_of_a_map_keep_their_channels_together(self) -> None:
        spec = Input(channels=3, size=96)  # maps of 3×3
        pooled, tokens = features(create("resnet18", spec), spec)
        torch.testing.assert_close(tokens.mean(1), pooled)
        maps = maps_of(create("resnet18", spec), spec)
        torch.testing.assert_close(tokens[0, 5], maps[0, :, 1, 2], rtol=0, atol=0)

    def test_tokens_of_a_map_with_channels_last_keep_their_channels_together(self) -> None:
        spec = Input(channels=3, size=96)
        made = create("test_mambaout", spec)
        maps = maps_of(made, spec)
        torch.testing.assert_close(features(made, spec).tokens[0, 5], maps[0, 1, 2], rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
    def test_takes_images_of_one_channel(self, name: str) -> None:
        spec = Input(channels=1, size=32)
        assert features(create(name, spec), spec).pooled.shape[0] == 2

    def test_is_in_training_mode(self) -> None:
        assert all(part.training for part in create("test_resnet").module.modules())

    def test_weights_are_a_function_of_the_seed(self) -> None:
        digests = [
            weights_digest(create("test_vit", seed=seed).module.state_dict()) for seed in (1, 1, 2)
        ]
        assert digests[0] == digests[1] != digests[2]

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("tset_vit", "found 'tset_vit'. Did you mean 'test_vit"),
            ("resnet18.nosuchtag", r"found 'resnet18\.nosuchtag'. Did you mean 'resnet18'"),
            ("", "found ''"),
            ("hf-hub:timm/resnet18.a1_in1k", "found 'hf-hub"),
        ],
    )
    def test_an_unknown_name_is_met_with_the_nearest(self, name: str, words: str) -> None:
        with pytest.raises(BackboneError, match=words):
            create(name)

    def test_a_size_that_a_model_can_not_take_is_said(self) -> None:
        with pytest.raises(BackboneError, match="'test_vit' to take images of 3×8×8"):
            create("test_vit", Input(channels=3, size=8))

    def test_names_match_a_pattern(self) -> None:
        found = Timm().names("test_*")
        assert "test_vit" in found
        assert "resnet18" not in found


def save_safely(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(state, path)
    return path


def save_by_torch(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".pth")
    torch.save(state, path)
    return path


def save_as_checkpoint(state: dict[str, Tensor], path: Path) -> Path:
    path = path.with_suffix(".pt")
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


class TestWeights:
    @pytest.mark.parametrize("save", [save_safely, save_by_torch, save_as_checkpoint])
    @pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
    def test_of_a_file_are_the_files(
        self, name: str, save: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path
    ) -> None:
        made = create(name, seed=1)
        made.module.train()(images())  # moves running statistics
        inner = made.module.get_submodule("model")
        path = save(inner.state_dict(), tmp_path / "weights")
        loaded = create(name, weights=str(path), seed=2)
        assert weights_digest(create(name, seed=2).module.state_dict()) != weights_digest(
            made.module.state_dict()
        )
        assert weights_digest(loaded.module.state_dict()) == weights_digest(
            made.module.state_dict()
        )

    def test_of_a_whole_classifier_are_taken_without_its_last_layer(self, tmp_path: Path) -> None:
        torch.manual_seed(3)
        whole = timm.create_model("test_resnet", num_classes=7)
        path = save_by_torch(whole.state_dict(), tmp_path / "weights")
        loaded = create("test_resnet", weights=str(path)).module.get_submodule("model")
        state = {name: value for name, value in whole.state_dict().items() if "fc." not in name}
        assert weights_digest(loaded.state_dict()) == weights_digest(state)

    def test_for_three_channels_serve_one(self, tmp_path: Path) -> None:
        path = save_by_torch(
            create("test_resnet").module.get_submodule("model").state_dict(), tmp_path / "weights"
        )
        spec = Input(channels=1, size=32)
        made = create("test_resnet", spec, weights=str(path), seed=2)
        assert features(made, spec).pooled.shape == (2, made.width)

    def test_of_another_model_are_refused(self, tmp_path: Path) -> None:
        state = create("test_resnet").module.get_submodule("model").state_dict()
        path = save_by_torch(state, tmp_path / "weights")
        with pytest.raises(BackboneError, match=r"weights of 'test_convnext'.*found none for"):
            create("test_convnext", weights=str(path))

    def test_of_another_size_are_refused(self, tmp_path: Path) -> None:
        state = create("test_resnet").module.get_submodule("model").state_dict()
        state = {name: value[..., :1].clone() for name, value in state.items() if value.dim()}
        path = save_by_torch(state, tmp_path / "weights")
        with pytest.raises(BackboneError, match=r"weights of 'test_resnet' from .*RuntimeError"):
            create("test_resnet", weights=str(path))

    def test_of_a_part_of_the_model_are_refused(self, tmp_path: Path) -> None:
        state = create("test_resnet").module.get_submodule("model").state_dict()
        gone = [name for name in state if name.startswith("layer4.") and "conv" in name]
        assert gone
        path = save_by_torch(
            {name: value for name, value in state.items() if name not in gone}, tmp_path / "part"
        )
        with pytest.raises(BackboneError, match=gone[0]):
            create("test_resnet", weights=str(path), seed=2)

    def test_of_a_missing_file_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BackboneError, match=r"'none', 'hub' or a file, found '.*gone\.pth'"):
            create("test_vit", weights=str(tmp_path / "gone.pth"))

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_of_a_damaged_file_are_refused(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(b"no weights at all")
        with pytest.raises(BackboneError, match="without running code"):
            create("test_vit", weights=str(path))

    def test_that_hold_code_are_refused_and_do_not_run(self, tmp_path: Path) -> None:
        marker, path = tmp_path / "ran", tmp_path / "weights.pth"
        torch.save({"model": Malicious(marker)}, path)
        with pytest.raises(BackboneError, match=r"weights\.pth that load without running code"):
            create("test_vit", weights=str(path))
        assert not marker.exists()
        torch.load(path, weights_only=False)  # the file does run code where that is let
        assert marker.exists()

    def test_that_are_an_old_pickle_are_refused_and_do_not_run(self, tmp_path: Path) -> None:
        marker, path = tmp_path / "ran", tmp_path / "weights.pth"
        path.write_bytes(pickle.dumps(Malicious(marker)))
        with pytest.raises(BackboneError, match="without running code"):
            create("test_vit", weights=str(path))
        assert not marker.exists()
        pickle.loads(path.read_bytes())
        assert marker.exists()

    def test_of_the_hub_are_refused_offline(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(BackboneError, match=r"'test_vit' from the hub.*Offline.*weights=PATH"):
            create("test_vit", weights="hub")

    def test_of_the_hub_are_refused_where_there_are_none(self) -> None:
        with pytest.raises(BackboneError, match="weights of 'mobilenetv3_large_075' from the hub"):
            create("mobilenetv3_large_075", weights="hub")


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_name_may_say_its_provider() -> None:
    assert split_name("resnet18") == ("timm", "resnet18")
    assert split_name("timm:resnet18") == ("timm", "resnet18")
    assert split_name("other:a:b") == ("other", "a:b")
