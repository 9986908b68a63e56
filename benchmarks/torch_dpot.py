"""DPOT in plain PyTorch, the peer of `sciml.model`: library layers, names as in the published checkpoints."""

import torch
from torch import Tensor, nn

from sciml.model import ModelConfig

_ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU}


class Filter(nn.Module):
    """A Fourier filter: two complex block-diagonal layers on the kept modes, and its own input added."""

    def __init__(self, config: ModelConfig) -> None:
        """Builds the filter of a config."""
        super().__init__()
        blocks, size = config.num_blocks, config.width // config.num_blocks
        self.modes, self.activation = config.modes, _ACTIVATIONS[config.activation]()
        self.w1, self.w2 = (nn.Parameter(torch.rand(2, blocks, size, size) / size**2) for _ in range(2))
        self.b1, self.b2 = (nn.Parameter(torch.rand(2, blocks, size) / size**2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W)."""
        batch, channels, height, width = x.shape
        full = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        kept = full[:, : self.modes, : self.modes].unflatten(-1, self.w1.shape[1:3])
        real, imaginary = self._layer(kept.real, kept.imag, self.w1, self.b1)
        real, imaginary = self._layer(self.activation(real), self.activation(imaginary), self.w2, self.b2)
        out = torch.zeros_like(full)
        out[:, : self.modes, : self.modes] = torch.complex(real, imaginary).flatten(-2)
        mixed = torch.fft.irfft2(out, s=(height, width), dim=(1, 2), norm="ortho")
        return mixed.permute(0, 3, 1, 2) + x

    @staticmethod
    def _layer(real: Tensor, imaginary: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        def times(x: Tensor, w: Tensor) -> Tensor:
            return torch.einsum("...bi,bio->...bo", x, w)

        return (
            times(real, weight[0]) - times(imaginary, weight[1]) + bias[0],
            times(imaginary, weight[0]) + times(real, weight[1]) + bias[1],
        )


class Block(nn.Module):
    """Filter and feed-forward, one skip around both."""

    def __init__(self, config: ModelConfig) -> None:
        """Builds a block of a config."""
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.norm1, self.norm2 = nn.GroupNorm(8, config.width), nn.GroupNorm(8, config.width)
        self.filter = Filter(config)
        activation = _ACTIVATIONS[config.activation]()
        self.mlp = nn.Sequential(nn.Conv2d(config.width, hidden, 1), activation, nn.Conv2d(hidden, config.width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) for x (B, C, H, W)."""
        return x + self.mlp(self.norm2(self.filter(self.norm1(x))))


class TimeAggregation(nn.Module):
    """A weighted sum over time, each step's channels with a weight matrix of its own."""

    def __init__(self, config: ModelConfig) -> None:
        """Builds the layer of a config."""
        super().__init__()
        steps, width = config.in_steps, config.width
        self.w = nn.Parameter(torch.randn(steps, width, width) / (steps * width**0.5))
        if config.time_aggregation == "exp_mlp":
            self.gamma = nn.Parameter(2 ** torch.linspace(-10, 10, width)[None])

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C) for x (B, H, W, T, C)."""
        if hasattr(self, "gamma"):
            x = x * torch.cos(torch.linspace(0, 1, x.shape[-2])[:, None] @ self.gamma)
        return torch.einsum("tij,...ti->...j", self.w, x)


class PatchEmbedding(nn.Module):
    """Patches to features."""

    def __init__(self, config: ModelConfig) -> None:
        """Builds the embedding of a config."""
        super().__init__()
        hidden = config.out_channels * config.patch_size + 3
        patches = nn.Conv2d(config.in_channels + 3, hidden, config.patch_size, config.patch_size)
        self.proj = nn.Sequential(patches, _ACTIVATIONS[config.activation](), nn.Conv2d(hidden, config.width, 1))


class TorchDPOT(nn.Module):
    """The network of `sciml.model.DPOT` for fields (B, X, Y, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        """Builds the network of a config."""
        super().__init__()
        width, out = config.width, config.out_width
        latent = config.image_size // config.patch_size

        def activation() -> nn.Module:
            return _ACTIVATIONS[config.activation]()

        self.config = config
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, width, latent, latent))
        self.patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.normalize:
            self.scale_feats_mu = nn.Linear(2 * config.in_channels, width)
            self.scale_feats_sigma = nn.Linear(2 * config.in_channels, width)
        linears = nn.Linear(width, width), activation(), nn.Linear(width, width), activation()
        self.cls_head = nn.Sequential(*linears, nn.Linear(width, config.num_classes))
        self.time_agg_layer = TimeAggregation(config)
        self.out_layer = nn.Sequential(
            nn.ConvTranspose2d(width, out, config.patch_size, config.patch_size),
            activation(),
            nn.Conv2d(out, out, 1),
            activation(),
            nn.Conv2d(out, config.out_channels * config.out_steps, 1),
        )

    def forward(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted fields (B, X, Y, out_steps, C) and class logits."""
        batch, size_x, size_y, steps, _ = fields.shape
        mean, deviation = torch.zeros(()), torch.ones(())
        if self.config.normalize:
            mean = fields.mean(dim=(1, 2, 3), keepdim=True)
            deviation = fields.std(dim=(1, 2, 3), keepdim=True) + 1e-6
            fields = (fields - mean) / deviation
        axes = (torch.linspace(0, 1, length) for length in (size_x, size_y, steps))
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).expand(batch, -1, -1, -1, -1)
        images = torch.cat([fields, grid], dim=-1).permute(0, 3, 4, 1, 2).flatten(0, 1)
        x = self.patch_embed.proj(images) + self.pos_embed
        x = self.time_agg_layer(x.unflatten(0, (batch, steps)).permute(0, 3, 4, 1, 2)).permute(0, 3, 1, 2)
        if self.config.normalize:
            scales = torch.cat([mean, deviation], dim=-1).flatten(1)
            x = self.scale_feats_sigma(scales)[..., None, None] * x + self.scale_feats_mu(scales)[..., None, None]
        for block in self.blocks:
            x = block(x)
        logits = self.cls_head(x.mean(dim=(2, 3)))
        y = self.out_layer(x).permute(0, 2, 3, 1).unflatten(-1, (self.config.out_steps, -1))
        return y * deviation + mean, logits
