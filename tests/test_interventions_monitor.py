"""The monitor of activations: closed forms on Gaussians, and edits of growing size on the organism."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr

from markovsafety import interventions as inside
from markovsafety import organism
from markovsafety.bound import clopper_pearson
from markovsafety.errors import InputError
from markovsafety.interventions import Host, open_host

torch = pytest.importorskip("torch")

LEVELS = (1, 2, 3, 4)
DIM = 12


@pytest.fixture(scope="module")
def host() -> Host:
    return open_host(organism.model_path("shallow"))


def texts(split: str, n: int, seed: int) -> list:
    kinds = [(harmful, marker) for harmful in (True, False) for marker in (None, "jailbreak", "trigger")]
    return [p for h, m in kinds for p in organism.prompts(split, n=n, harmful=h, marker=m, seed=seed)]


@pytest.fixture(scope="module")
def monitor(host):
    clean = inside.activations(host, texts("train", 96, 0), levels=LEVELS)[:, :, 0]
    return inside.fit_monitor(clean, LEVELS, rate=0.02, host=host)


@pytest.fixture(scope="module")
def refusal(host):
    accepted = organism.prompts("train", n=48, harmful=False)
    refused = organism.prompts("train", n=48, harmful=True)
    return inside.whole_layer(host, refused, accepted, 2)


def gaussian(n: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated activations of two levels, and the unit vector along which they may be shifted, at both levels."""
    rng = np.random.default_rng(seed)
    root = np.random.default_rng(99).standard_normal((2, DIM, DIM))
    along = np.linalg.inv(root[0])[0]  # the coordinate z_0 of x = root z
    x = np.einsum("ldz,nlz->nld", root, rng.standard_normal((n, 2, DIM)))
    x[:, 0] += shift * root[0][:, 0]  # moves z_0 by `shift` standard deviations
    return x, along / np.linalg.norm(along)


def test_clean_scores_are_about_one_and_alarms_come_at_the_wished_rate():
    monitor = inside.fit_monitor(gaussian(3000, 0)[0], (0, 1), rate=0.05)
    clean = gaussian(6000, 1)[0]
    size = np.mean(monitor.level_scores(clean) ** 2, axis=0)  # shrinking makes small variances larger, scores smaller
    assert (size > 0.85).all()
    assert (size < 1.05).all()
    alarms = monitor.false_alarms(clean)
    # False-alarm rate of the test 1e-7: the interval at that level, and as much again for the threshold's own error.
    lower, upper = clopper_pearson(alarms.info["events"], 6000, 1 - 1e-7)
    error = 5.5 * np.sqrt(0.05 * 0.95 / 3000)
    assert lower - error <= 0.05 <= upper + error


def test_a_known_direction_sees_a_shift_as_the_normal_law_says():
    clean, along = gaussian(4000, 2)
    monitor = inside.fit_monitor(clean, (0, 1), rate=0.05, directions={"z": (0, along)})
    assert monitor.levels == (0,)
    shifted = gaussian(4000, 3, shift=2.5)[0][:, :1]
    cut = 1.959964  # two-sided at 5 %
    expected = ndtr(2.5 - cut) + ndtr(-2.5 - cut)
    caught = monitor.alarms(shifted).mean()
    assert abs(caught - expected) <= 5.3 * np.sqrt(0.25 / 4000) + 0.05


def test_scores_do_not_depend_on_the_basis():
    """The covariance is shrunk towards a multiple of the identity, so a rotation of the stream leaves scores alone."""
    clean, edited = gaussian(400, 4)[0], gaussian(50, 5, shift=3.0)[0]
    turn = np.linalg.qr(np.random.default_rng(6).standard_normal((DIM, DIM)))[0]
    plain = inside.fit_monitor(clean, (0, 1), rate=0.05).scores(edited)
    turned = inside.fit_monitor(clean @ turn, (0, 1), rate=0.05).scores(edited @ turn)
    np.testing.assert_allclose(turned, plain, rtol=1e-7)


@pytest.mark.parametrize("n", [DIM + 40, DIM, DIM - 3])
def test_fewer_texts_than_dimensions_give_the_scores_of_the_whole_covariance(n):
    clean, others = gaussian(n, 6)[0], gaussian(30, 7)[0]
    clean[:, 1, :5] = clean[:, 1, 5:10]  # a level of lower rank
    monitor = inside.fit_monitor(clean, (0, 1), rate=0.2)
    assert monitor.whiten.shape[1] <= min(n, DIM)
    scores = monitor.level_scores(others)
    for level in range(2):
        x = clean[:, level] - clean[:, level].mean(axis=0)
        covariance = x.T @ x / n
        target = np.trace(covariance) / DIM * np.eye(DIM)
        noise = np.mean([np.sum((np.outer(row, row) - covariance) ** 2) for row in x]) / n
        share = np.clip(noise / np.sum((covariance - target) ** 2), 1e-6, 1)
        y = others[:, level] - clean[:, level].mean(axis=0)
        dense = np.einsum("nd,de,ne->n", y, np.linalg.inv((1 - share) * covariance + share * target), y)
        np.testing.assert_allclose(scores[:, level], np.sqrt(dense / DIM), rtol=1e-8)


def test_edits_of_growing_size_are_seen_better(host, monitor, refusal):
    held = texts("held", 32, 1)
    found = inside.detection(host, monitor, held, refusal, (0.0, 0.03, 0.25, 2.0))
    areas = [area.value for area in found.auc]
    assert areas[0] == 0.5  # the same texts, unedited
    assert areas[1] < areas[2]
    assert areas[2] >= 0.95
    assert found.caught[3].lower >= 0.9
    assert found.visible == 0.25
    # 192 texts; at a rate of .02 more than 17 alarms have a probability below 1e-6.
    assert found.false_alarms.info["events"] <= 17
    assert found.false_alarms.upper > found.false_alarms.value
    assert found.control[3].value > found.control[0].value
    assert found.to_json()["visible"] == 0.25
    assert "AUC" in str(found)


def test_an_edit_above_the_levels_that_are_watched_is_not_seen(host, refusal):
    low = inside.fit_monitor(
        inside.activations(host, texts("train", 48, 0), levels=(1,))[:, :, 0], (1,), rate=0.05, host=host
    )
    found = inside.detection(host, low, texts("held", 16, 1), refusal, (4.0,))
    assert found.auc[0].value == 0.5
    assert found.visible is None


def test_a_watcher_raises_alarms_while_the_model_answers(host, monitor, refusal):
    prompts = organism.prompts("held", n=24, harmful=False)
    judge = organism.OrganismJudge()

    def answered(edit, **options):
        with inside.watching(host, monitor, **options) as alarms:
            inside.behave(host, prompts, edit, judge=judge, n=1, max_tokens=8)
        return alarms

    quiet, loud = answered(None), answered(3 * refusal)
    recorded = inside.activations(host, prompts, levels=LEVELS, edit=3 * refusal)[:, :, 0]
    assert quiet.scores.shape == loud.scores.shape == (24,)  # the validation of the bound edit does not count
    np.testing.assert_allclose(np.sort(loud.scores), np.sort(monitor.scores(recorded)), rtol=2e-3, atol=2e-3)
    assert quiet.raised <= 6
    assert loud.raised == 24
    clean = inside.activations(host, texts("train", 48, 0), levels=(2,))[:, :, 0]
    own = inside.fit_monitor(clean, (2,), rate=0.05, host=host)  # the level of the edit, which is attached later
    with inside.watching(host, own) as alarms:
        inside.behave(host, prompts, 3 * refusal, judge=judge, n=1, max_tokens=2)
    at_level = own.scores(recorded[:, [LEVELS.index(2)]])
    np.testing.assert_allclose(np.sort(alarms.scores), np.sort(at_level), rtol=2e-3, atol=2e-3)
    every = answered(None, prompts_only=False)
    assert len(every.passes) > 1
    hooks = [*host.decoder._forward_pre_hooks, *(h for b in host.blocks for h in b._forward_hooks)]
    assert not hooks  # nothing is left on the model


def test_a_monitor_is_read_back_and_belongs_to_its_model(host, monitor, tmp_path):
    inside.write_monitor(monitor, tmp_path / "monitor.safetensors")
    again = inside.read_monitor(tmp_path / "monitor.safetensors")
    values = inside.activations(host, texts("held", 2, 3), levels=LEVELS)[:, :, 0]
    np.testing.assert_allclose(again.scores(values), monitor.scores(values), rtol=1e-12)  # other strides, other sums
    assert (again.levels, again.rate, again.kind) == (LEVELS, 0.02, "mahalanobis")
    other = open_host(organism.model_path("base"))
    with (
        pytest.raises(InputError, match="the monitor was made for another model: its weights differ"),
        inside.watching(other, again),
    ):
        pass


def test_what_cannot_be_watched_is_refused(host, monitor):
    x = gaussian(100, 7)[0]
    with pytest.raises(InputError, match="no monitor is fitted"):
        inside.fit_monitor(x, (0, 1), rate=0.001)
    with pytest.raises(InputError, match="no monitor is fitted"):
        inside.fit_monitor(x[:, 0], (0,), rate=0.1)
    with pytest.raises(InputError, match="nothing can be watched"):
        inside.fit_monitor(np.ones_like(x), (0, 1), rate=0.1)
    with pytest.raises(InputError, match="nothing can be watched"):
        inside.fit_monitor(x, (0, 1), rate=0.1, directions={"z": (5, np.ones(DIM))})
    with pytest.raises(InputError, match="a direction at level 0"):
        inside.fit_monitor(x, (0, 1), rate=0.1, directions={"z": (0, np.zeros(DIM))})
    with pytest.raises(InputError, match="activations have shape"):
        monitor.scores(np.zeros((3, 2, 5)))
    first = inside.activations(host, texts("train", 8, 0), levels=(0, 1))[:, :, 0]
    assert inside.fit_monitor(first, (0, 1), rate=0.1).levels == (1,)  # the template's own token says nothing
