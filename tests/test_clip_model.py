"""The model: shapes, initial weights, recomputation, lower precision. Its features against those of
other implementations: test_clip_formats.py."""

import math
import re
from collections import Counter

import pytest
import torch
from test_clip_formats import batch, build, configured
from torch.utils.checkpoint import checkpoint

import clip
import main_CLIP
import main_NPC
from clip.model import Bottleneck, ResidualAttentionBlock
from clip.weights import CONFIGS
from utils.method.batches import cut_tokens

VIT, RN = configured(), configured("ResNet")


@torch.no_grad()
def test_logits_are_scaled_cosines():
    """Features: test_models_of_open_clip."""
    model = build().double()
    images, tokens = batch(VIT)
    image, text = model.encode_image(images), model.encode_text(tokens)
    per_image, per_text = model(images, tokens)
    cosine = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=2)
    torch.testing.assert_close(per_image, model.logit_scale.exp() * cosine, rtol=1e-9, atol=1e-9)
    assert torch.equal(per_text, per_image.T)


@torch.no_grad()
def test_tokens_behind_the_end_do_not_matter():
    """So that a batch of texts is cut at the longest one."""
    model, (_, tokens) = build().double(), batch(VIT)
    tokens[0, 3] = 49407
    whole = model.encode_text(tokens)
    tokens[:, 7:] = 0
    assert cut_tokens(tokens).shape == (3, 7)
    torch.testing.assert_close(model.encode_text(cut_tokens(tokens)), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.encode_text(tokens.int()), whole)


def test_text_too_long_and_empty_batches():
    model = build()
    with pytest.raises(ValueError, match="78 tokens"):
        model.encode_text(torch.zeros(1, 78, dtype=torch.int64))
    assert model.encode_text(torch.zeros(0, 12, dtype=torch.int64)).shape == (0, 24)
    assert model.encode_image(torch.zeros(0, 3, 16, 16)).shape == (0, 24)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_of_the_released_weights(name):
    """open_clip's models have them too. They tell the architecture."""
    with torch.device("meta"):
        own = clip.CLIP(**CONFIGS[name])
    shapes = {key: value.shape for key, value in own.state_dict().items()}
    assert clip.infer_config(own.state_dict(), {}) == CONFIGS[name] == own.config
    assert clip.describe(own.config) == name
    assert own.visual.input_resolution == CONFIGS[name]["image_resolution"]
    if numbers := {"ViT-B/32": 151_277_313, "RN50": 102_007_137}.get(name):
        assert sum(value.numel() for value in own.parameters()) == numbers
    if name != "tiny":
        open_clip = pytest.importorskip("open_clip")
        theirs = open_clip.get_model_config(
            re.sub("[/@]", "-", name).removesuffix("px") + "-quickgelu")
        with torch.device("meta"):
            theirs = open_clip.CLIP(**theirs).state_dict()
        assert shapes == {key: value.shape for key, value in theirs.items()}


def test_initialisation():
    torch.manual_seed(0)
    model = clip.CLIP(**VIT | {"transformer_width": 256, "transformer_heads": 4,
                               "transformer_mlp_width": 1024})
    block = model.transformer.resblocks[1]
    expected = [
        (model.token_embedding.weight, 0.02), (model.positional_embedding, 0.01),
        (model.text_projection, 256**-0.5),
        (block.attn.in_proj_weight, 256**-0.5),
        (block.attn.out_proj.weight, 256**-0.5 / 2),
        (block.mlp.c_fc.weight, 512**-0.5),
        (block.mlp.c_proj.weight, 256**-0.5 / 2),
        (model.visual.positional_embedding, 128**-0.5),
        (model.visual.proj, 128**-0.5),
    ]
    for value, std in expected:
        assert float(value.detach().std()) == pytest.approx(std, rel=0.08)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    resnet = clip.CLIP(**RN)
    assert not resnet.visual.layer3[0].bn3.weight.any()
    assert resnet.visual.attnpool.q_proj.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)


@pytest.mark.parametrize("name", ["like OpenAI's", "ResNet"])
def test_grad_checkpointing_saves_memory_and_changes_no_gradient(name):
    images, tokens = batch(configured(name))
    outcome, saved, calls = {}, Counter(), Counter()
    for recompute in (False, True):
        model = build(name).double()
        model.grad_checkpointing = recompute

        def count_call(*_, recompute=recompute):
            calls[recompute] += 1

        def count_bytes(tensor, recompute=recompute):
            saved[recompute] += tensor.nbytes
            return tensor

        for module in model.modules():
            if isinstance(module, Bottleneck | ResidualAttentionBlock):
                module.register_forward_pre_hook(count_call)
        with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor):
            logits, _ = model(images.double(), tokens)
        torch.nn.functional.cross_entropy(logits, torch.arange(len(images))).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert None not in gradients.values()
        outcome[recompute] = logits.detach(), gradients
    torch.testing.assert_close(outcome[True], outcome[False], rtol=1e-9, atol=1e-12)
    assert saved[True] < 0.6 * saved[False] and calls[True] == 2 * calls[False]


@pytest.mark.parametrize("script", [main_CLIP, main_NPC])
def test_grad_checkpointing_is_what_the_option_turns_on(script, dataset, tmp_path, monkeypatch):
    calls = Counter()

    def count(*args, **options):
        calls[experiment] += 1
        return checkpoint(*args, **options)

    monkeypatch.setattr(clip.model, "checkpoint", count)
    data = dataset("cc")
    for experiment, option in (("off", []), ("on", ["--grad_checkpointing"])):
        script.main([*data.options, "--vision_model", "tiny", "--device", "cpu",
                     "--num_workers", "0", "--batch_size", "12", "--epochs", "1", *option,
                     "--checkpoint_path", str(tmp_path), "--experiments", experiment])
    assert calls["off"] == 0 and calls["on"] >= 4  # two blocks in each of two towers


@pytest.mark.parametrize("name", ["like OpenAI's", "ResNet"])
def test_fp16_conversion(name):
    model = clip.convert_weights_to_fp16(build(name))
    assert model.dtype == torch.float16
    for name, value in model.state_dict().items():
        norm = any(part.startswith(("ln_", "bn", "1")) for part in name.split(".")[:-1][-1:])
        keeps = norm or "embedding" in name or name == "logit_scale"
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if keeps else torch.float16), name


@pytest.mark.parametrize("kind", ["converted", "half", "bfloat16", "autocast"])
@torch.no_grad()
def test_lower_precision_is_close(kind):
    images, tokens = batch(VIT)
    model = build().double()
    exact = torch.stack([model.encode_image(images.double()), model.encode_text(tokens)])
    model = model.float()
    if kind == "converted":
        model = clip.convert_weights_to_fp16(model)
    elif kind != "autocast":
        model = model.to(getattr(torch, kind))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        out = torch.stack([model.encode_image(images), model.encode_text(tokens)])
    error = (out.double() - exact).norm() / exact.norm()
    assert 0 < error < (0.03 if kind in ("bfloat16", "autocast") else 0.004)
    assert out.dtype == (torch.float16 if kind in ("converted", "half") else torch.bfloat16)
