"""CLIP's two encoders (Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021): a Vision Transformer or a modified ResNet for images, a causal transformer for
text, both projected into one space of `embed_dim` dimensions.

Parameter names and numerics are those of OpenAI's released weights, which load with strict=True.
The residual stream has the dtype of the weights; layer norms are computed in at least float32.

Shapes in the comments: n images or texts, L tokens, d width of a tower, h heads, D embed_dim.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .preprocess import MEAN, STD

HEAD_WIDTH = 64  # in both towers of all of OpenAI's models
POOLING = 32  # of a ResNet's attention pooling: its stride, and its width over the stem's
WIDE_HEADS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}  # by width: ViT-H, g, bigG and e


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 (in float64 for float64 input); the output has the input's dtype."""

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the sigmoid approximation of GELU (Hendrycks & Gimpel, 2016)."""

    def forward(self, x):
        return F.silu(1.702 * x).div_(1.702)  # saves one tensor for the backward pass, not two


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


def attend(q, k, v, heads, causal=False):
    """Multi-head attention (Vaswani et al., 2017) of q (n, Lq, d) over k and v (n, Lk, d)."""
    if len(q) == 0:  # some CUDA kernels refuse an empty batch; all three stay in the graph
        return q + 0 * (k.sum() + v.sum())
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (n, h, L, d/h)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # (n, h, Lq, d/h)
    return out.transpose(1, 2).flatten(2)  # (n, Lq, d)


class SelfAttention(nn.Module):
    """Multi-head self-attention; the query, key and value projections are one matrix."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(attend(q, k, v, self.heads, self.causal))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer perceptron."""

    def __init__(self, width, heads, mlp_width, activation, causal):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, mlp_width),
                gelu=ACTIVATIONS[activation](),
                c_proj=nn.Linear(mlp_width, width),
            )
        )

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of residual attention blocks: (n, L, d) -> (n, L, d)."""

    def __init__(self, width, layers, heads, mlp_width, activation, causal=False):
        super().__init__()
        self.resblocks = nn.Sequential(*(
            ResidualAttentionBlock(width, heads, mlp_width, activation, causal)
            for _ in range(layers)
        ))

    def forward(self, x, recompute=False):
        return run_blocks(self.resblocks, x, recompute)


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021) with another layer norm before the blocks: (n, 3, R, R) ->
    (n, D), the projected class token."""

    def __init__(self, input_resolution, patch_size, width, layers, heads, mlp_width, activation,
                 output_dim):
        super().__init__()
        self.input_resolution = input_resolution
        scale = width**-0.5
        patches = (input_resolution // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(patches + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, mlp_width, activation)
        self.ln_post = LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, images, recompute=False):
        dtype, side = self.conv1.weight.dtype, self.conv1.stride[0]
        x = images.unfold(2, side, side).unfold(3, side, side)  # (n, 3, R/side, R/side, side, side)
        x = x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (n, patches, 3 side^2)
        x = F.linear(x, self.conv1.weight.flatten(1)).to(dtype)  # (n, patches, d)
        first = self.class_embedding.to(dtype).expand(len(x), 1, -1)  # (n, 1, d)
        x = torch.cat([first, x], dim=1) + self.positional_embedding.to(dtype)  # (n, patches+1, d)
        x = self.transformer(self.ln_pre(x), recompute)
        return self.ln_post(x[:, 0]) @ self.proj  # (n, D)


class Bottleneck(nn.Module):
    """ResNet bottleneck. Its stride is an average pooling before the last convolution, and before
    the convolution of the shortcut (anti-aliasing; Zhang, 2019)."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        nn.init.zeros_(self.bn3.weight)  # each block starts as its shortcut
        self.downsample = None
        if stride > 1 or inplanes != 4 * planes:
            parts = [
                ("-1", nn.AvgPool2d(stride)),
                ("0", nn.Conv2d(inplanes, 4 * planes, 1, bias=False)),
                ("1", nn.BatchNorm2d(4 * planes)),
            ]
            self.downsample = nn.Sequential(OrderedDict(parts))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    """Attention pooling: the mean of all positions is the query over itself and every position."""

    def __init__(self, side, width, heads, output_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        for projection in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (n, side*side, d)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (n, side*side+1, d)
        x = x + self.positional_embedding.to(x.dtype)
        x = attend(self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x), self.heads)  # (n, 1, d)
        return self.c_proj(x[:, 0])  # (n, D)


class ModifiedResNet(nn.Module):
    """ResNet with a stem of three convolutions (He et al., 2019), anti-aliased strides and
    attention pooling: (n, 3, R, R) -> (n, D)."""

    def __init__(self, input_resolution, width, layers, heads, output_dim):
        super().__init__()
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, layers[0], stride=1)
        self.layer2 = self._stage(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = self._stage(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = self._stage(16 * width, 8 * width, layers[3], stride=2)
        self.attnpool = AttentionPool2d(
            input_resolution // POOLING, POOLING * width, heads, output_dim
        )

    @staticmethod
    def _stage(inplanes, planes, blocks, stride):
        rest = (Bottleneck(4 * planes, planes, 1) for _ in range(blocks - 1))
        return nn.Sequential(Bottleneck(inplanes, planes, stride), *rest)

    def forward(self, images, recompute=False):
        x = F.relu(self.bn1(self.conv1(images)))  # (n, d/2, R/2, R/2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.avg_pool2d(x, 2)  # (n, d, R/4, R/4)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = run_blocks(stage, x, recompute)
        return self.attnpool(x)  # from (n, 32 d, R/32, R/32)


class CLIP(nn.Module):
    """The two encoders and the temperature.

    `config` holds the arguments of `complete_config`: CLIP(**model.config) is the same
    architecture. Initialisation is that of OpenAI's release. With `grad_checkpointing = True`,
    training saves only the input of each residual block and recomputes the rest in the backward
    pass.
    """

    def __init__(self, **config):
        super().__init__()
        self.config = config = complete_config(**config)
        self.embed_dim, resolution = config["embed_dim"], config["image_resolution"]
        self.context_length, self.vocab_size = config["context_length"], config["vocab_size"]
        self.image_mean, self.image_std = config["image_mean"], config["image_std"]
        self.grad_checkpointing = False
        tower = config["vision_width"], config["vision_layers"], config["vision_heads"]
        if config["vision_patch_size"]:
            self.visual = VisionTransformer(
                resolution, config["vision_patch_size"], *tower, config["vision_mlp_width"],
                config["activation"], self.embed_dim
            )
        else:
            self.visual = ModifiedResNet(resolution, *tower, self.embed_dim)
        width = config["transformer_width"]
        self.transformer = Transformer(
            width, config["transformer_layers"], config["transformer_heads"],
            config["transformer_mlp_width"], config["activation"], causal=True
        )
        self.token_embedding = nn.Embedding(self.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(self.context_length, width))
        self.ln_final = LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, self.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._init_text()

    def _init_text(self):
        width = self.config["transformer_width"]
        residual = (2 * self.config["transformer_layers"]) ** -0.5  # additions to the stream
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * residual)

    @property
    def dtype(self):
        """Dtype of the large weights, and of what the encoders return outside of autocast."""
        return self.visual.conv1.weight.dtype

    def encode_image(self, images):
        """Floating-point images (n, 3, R, R) -> embeddings (n, D), not normalised. R is
        visual.input_resolution; the images come from `clip.normalize` with `image_mean` and
        `image_std`."""
        return self.visual(images.to(self.dtype), self.grad_checkpointing)

    def encode_text(self, tokens):
        """Integer tokens (n, L) with L <= context_length -> embeddings (n, D), not normalised.

        A text's embedding is taken at its end token, the largest id. Attention is causal, so the
        tokens after it have no effect: a batch may be cut at the end of its longest text. Raises
        ValueError if L is too large.
        """
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(f"{length} tokens, but the context length is {self.context_length}")
        x = self.token_embedding(tokens).to(self.dtype)  # (n, L, d)
        x = x + self.positional_embedding[:length].to(self.dtype)
        x = self.transformer(x, self.grad_checkpointing)
        end = tokens.argmax(dim=-1)  # (n,)
        x = self.ln_final(x[torch.arange(len(x), device=x.device), end])  # (n, d)
        return x @ self.text_projection  # (n, D)

    def forward(self, images, tokens):
        """Images (n, 3, R, R) and tokens (m, L) -> exp(logit_scale) times the cosine similarities:
        (logits_per_image (n, m), logits_per_text (m, n))."""
        image = self.encode_image(images)
        text = self.encode_text(tokens)
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        logits = self.logit_scale.exp() * image @ text.T
        return logits, logits.T


def run_blocks(blocks, x, recompute):
    """Output of `blocks` applied in order. With `recompute`, only their inputs are saved for the
    backward pass, which computes the rest again; batch norms in training mode would then count each
    batch twice in their running statistics."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = block(x)
    return x


def convert_weights_to_fp16(model):
    """Convert a CLIP model's convolutions, linear layers, attention weights and projections to half
    precision, in place, as OpenAI's loader does on a GPU. Layer and batch norms, embeddings of
    tokens and positions, and logit_scale keep their dtype. Returns the model."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.half()
        for name in ("in_proj_weight", "in_proj_bias", "text_projection", "proj"):
            parameter = getattr(module, name, None)
            if parameter is not None:
                parameter.data = parameter.data.half()
    return model


def complete_config(
    embed_dim,
    image_resolution,
    vision_layers,
    vision_width,
    vision_patch_size,
    transformer_width,
    transformer_layers=12,
    context_length=77,
    vocab_size=49408,
    transformer_heads=None,
    transformer_mlp_width=None,
    vision_heads=None,
    vision_mlp_width=None,
    activation="quick_gelu",
    image_mean=MEAN,
    image_std=STD,
    image_resize="shortest",
):
    """The `config` of a CLIP model: a dict with all of these names.

    vision_layers is an int for a Vision Transformer, four ints for a ResNet, whose patch size and
    MLP width are None. Default: heads as wide as in the published models, MLPs four times as wide
    as their tower. activation of the transformers: "quick_gelu" or "gelu" (exact). image_mean,
    image_std: of red, green, blue in [0, 1]; image_resize: as for `Preprocess`.
    """
    config = dict(locals())
    if isinstance(vision_layers, int):
        config["vision_mlp_width"] = vision_mlp_width or 4 * vision_width
        head_width = WIDE_HEADS.get(vision_width, HEAD_WIDTH)
        config["vision_heads"] = vision_heads or _quotient(vision_width, head_width)
    else:
        config["vision_heads"] = vision_heads or _quotient(vision_width * POOLING, HEAD_WIDTH)
    config["transformer_heads"] = transformer_heads or _quotient(transformer_width, HEAD_WIDTH)
    config["transformer_mlp_width"] = transformer_mlp_width or 4 * transformer_width
    return config


def _quotient(width, head_width):
    return width // head_width if width % head_width == 0 else None


def infer_config(state_dict, settings):
    """The `config` of the CLIP model whose weights are `state_dict` (OpenAI's names): from the
    shapes of its tensors, and from the dict `settings` what these do not tell. Raises KeyError,
    IndexError or ValueError if they are not a CLIP model's."""
    shape = {key: tuple(value.shape) for key, value in state_dict.items()}

    def count(prefix):
        return len({key[len(prefix) :].split(".")[0] for key in shape if key.startswith(prefix)})

    vocab_size, width = shape["token_embedding.weight"]
    if "visual.proj" in shape:
        vision_width, _, patch, _ = shape["visual.conv1.weight"]
        positions, stride = shape["visual.positional_embedding"][0], patch
        layers = count("visual.transformer.resblocks.")
        mlp_width = shape["visual.transformer.resblocks.0.mlp.c_fc.bias"][0]
    else:
        vision_width, patch = shape["visual.layer1.0.conv1.weight"][0], None
        positions, stride = shape["visual.attnpool.positional_embedding"][0], POOLING
        layers = tuple(count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        mlp_width = None
    sizes = {
        "embed_dim": shape["text_projection"][1],
        "image_resolution": settings.get("image_resolution", math.isqrt(positions - 1) * stride),
        "vision_layers": layers,
        "vision_width": vision_width,
        "vision_patch_size": patch,
        "vision_mlp_width": mlp_width,
        "transformer_width": width,
        "transformer_layers": count("transformer.resblocks."),
        "transformer_mlp_width": shape["transformer.resblocks.0.mlp.c_fc.bias"][0],
        "context_length": shape["positional_embedding"][0],
        "vocab_size": vocab_size,
    }
    return complete_config(**settings | sizes)
