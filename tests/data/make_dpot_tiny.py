"""Makes dpot_tiny.json and dpot_tiny.npz anew: `python tests/data/make_dpot_tiny.py DPOT`, a checkout of thu-ml/DPOT.

Needs torch, and what the checkout's models/dpot.py imports. The five models' settings are read from the JSON here.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def main() -> None:
    """Run the original network on seeded weights and inputs; write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    sys.path.insert(0, str(parser.parse_args().checkout))
    from models.dpot import DPOTNet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = json.loads((HERE / "dpot_tiny.json").read_text(encoding="utf-8"))
    arrays: dict[str, np.ndarray] = {}
    for model in settings["models"]:
        network = DPOTNet(**model["config"])
        redraw(network)
        content = run(network, model["config"])
        arrays |= {f"{model['name']}/{key}": value.detach().numpy() for key, value in content.items()}
        model["y_std"] = float(content["y"].detach().std())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if ".filter." in name:
                    parameter.zero_()
            change = (network(content["x"])[0] - content["y"]).abs().max()
        model["max_abs_change_if_fourier_weights_zero"] = float(change)
    settings["torch"] = torch.__version__
    np.savez_compressed(HERE / "dpot_tiny.npz", **arrays)
    (HERE / "dpot_tiny.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def redraw(network: torch.nn.Module) -> None:
    """Draw weights large enough for every part to show, in numbers that half precision holds (the file compresses)."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".filter.w" in name:
                parameter.copy_(0.6 * torch.randn(parameter.shape) / parameter.shape[2] ** 0.5)
            elif ".filter.b" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            elif ".norm" in name:
                parameter.copy_(name.endswith("weight") + 0.3 * torch.randn(parameter.shape))
            elif name == "pos_embed":
                parameter.copy_(0.5 * torch.randn(parameter.shape))
            parameter.copy_(parameter.half().float())


def run(network: torch.nn.Module, config: dict) -> dict[str, torch.Tensor]:
    """State, input, outputs, and the gradients of mean(y^2) + 0.1 mean(cls_pred^2)."""
    size = config["img_size"]
    x = 0.7 * torch.randn(2, size, size, config["in_timesteps"], config["in_channels"])
    x = (x + torch.tensor([0.0, -0.5, 1.0, 2.0])).half().float()
    y, cls_pred = network(x)
    loss = (y**2).mean() + 0.1 * (cls_pred**2).mean()
    content = {f"state/{name}": value.clone() for name, value in network.state_dict().items()}
    content |= {"x": x, "y": y, "cls_pred": cls_pred, "grad_loss": loss}
    loss.backward()
    norms = {f"grad_norm/{name}": p.grad.double().norm() for name, p in network.named_parameters()}
    return content | norms


if __name__ == "__main__":
    main()
