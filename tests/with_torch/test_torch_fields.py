"""Resampling is PyTorch's."""

import h5py
import numpy as np
import pytest
import torch

from sciml.fields import open_fields


@pytest.mark.parametrize(
    ("x", "y", "resolution"), [(16, 16, 8), (8, 8, 16), (15, 15, 7), (7, 9, 16), (5, 32, 11), (512, 3, 128), (1, 2, 3)]
)
def test_resampling_is_interpolate(tmp_path, x, y, resolution):
    flows = np.random.default_rng(0).standard_normal((2, x, y, 3, 4), np.float32)
    with h5py.File(tmp_path / "flows.hdf5", "w") as file:
        file["data"] = flows
    data = open_fields(tmp_path / "flows.hdf5", resolution=resolution, steps_needed=1)
    images = torch.from_numpy(flows[0]).double().permute(2, 3, 0, 1)  # of float32, torch rounds the positions too
    expected = torch.nn.functional.interpolate(images, (resolution, resolution), mode="bilinear", align_corners=False)
    read = data.train.read(0, 0, 3)
    np.testing.assert_allclose(read, expected.permute(2, 3, 0, 1).numpy(), atol=1e-6)
    data.train.close()
    data.test.close()
