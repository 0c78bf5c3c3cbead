"""Hitting probabilities on several devices, here four made of one CPU: samples spread over them, one chain placed."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import json

import jax
import numpy as np
import pytest

import markovsafety as ms
from markovsafety.bench import families
from markovsafety.bench.ours import layers
from markovsafety.cli import main
from markovsafety.errors import InputError
from markovsafety.hitting import device
from markovsafety.hitting.device_arguments import devices_of
from markovsafety.toy import ladder


@pytest.fixture(scope="module", autouse=True)
def devices():
    found = jax.devices("cpu")
    assert len(found) == 4, "JAX was imported before this file could ask for four devices"
    return found


def test_samples_spread_over_all_devices_of_a_name():
    """Seven samples of a layered chain: the answers of one device to the bit, within the bounds of the host's."""
    problem = families.layered(4, 24, 3)
    values = families.posterior(problem, 7).entries()
    many = device.batch(layers(problem), "harm")
    one, spread, host = (many.solve(values, device=where) for where in ("cpu:2", "cpu", None))
    assert np.array_equal(one.value, spread.value)
    apart = np.abs(spread.value - host.value).reshape(7, -1).max(1)
    assert (apart <= spread.error + host.error).all()
    assert (spread.error < 1e-12).all()


def test_names_of_devices(devices):
    assert devices_of("cpu") == devices
    assert devices_of("cpu:3,1") == [devices[3], devices[1]]
    for name in ("gpu", "cpu:4", "cpu:one"):
        with pytest.raises(InputError, match="device is "):
            devices_of(name)


def test_solve_goes_where_it_is_told(tmp_path, capsys):
    chain, path = ladder(start=2), tmp_path / "x.npz"
    ms.write_chain(chain, path)
    target = next(iter(chain.outcomes))
    assert main(["solve", str(path), "--target", target, "--device", "cpu:1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["result"]
    assert told["method"] == "device"
    assert told["certified"]
    plain = ms.hitting_probability(chain, target).at_start.value
    assert abs(told["at_start"]["value"] / plain - 1) < 1e-13
    assert main(["solve", str(path), "--target", target, "--device", "gpu"]) == 2
    assert "device is 'gpu'" in capsys.readouterr().err
    assert main(["solve", str(path), "--target", target, "--device", "cpu", "--method", "exact"]) == 2
    assert "only the method device" in capsys.readouterr().err
    with device.placed("cpu:3"):
        assert jax.numpy.zeros(()).devices() == {jax.devices("cpu")[3]}
