"""Schedulers of diffusers in ``sample``: the same images as our methods where they are the same method, errors else."""

import itertools

import diffusers
import pytest
import torch
from support.small import small_dc_dit, small_dit

from dcdit.diffusion import sample
from dcdit.diffusion.schedule import linear_schedule

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
LABELS = torch.tensor([1, 2, 3])
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.fixture(scope="module")
def model():
    return small_dc_dit(grid=(4, 4))


def ddim(**options):
    return diffusers.DDIMScheduler(**{**LINEAR, "clip_sample": False, **options})


def trained_for(model, objective):
    model.objective = objective
    return model


def test_ddim_is_ours(model):
    options = {"cfg_scale": 2.0, "drop_fraction": (0.2, 0.7), "seed": 3, "progress": False}
    ours = sample(model, LABELS, "ddim10", "ddim", **options)
    theirs = sample(model, LABELS, 10, scheduler=ddim(), **options)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)
    clipped = sample(model, LABELS, 10, scheduler=ddim(clip_sample=True), **options)
    torch.testing.assert_close(clipped, sample(model, LABELS, "ddim10", "ddim", clip=True, **options))
    assert not torch.allclose(clipped, theirs)


def test_flow_match_euler_is_ours(model):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    options = {"cfg_scale": 2.0, "budget": 7, "progress": False}
    steps = {"ours": [], "theirs": []}
    ours = sample(trained_for(model, "flow"), LABELS, 5, "euler", callback=steps["ours"].append, **options)
    theirs = sample(model, LABELS, 5, scheduler=scheduler, callback=steps["theirs"].append, **options)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    for mine, other in zip(*steps.values(), strict=True):
        assert (mine.number, mine.t) == (other.number, pytest.approx(other.t))
        torch.testing.assert_close(other.x0, mine.x0, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "objective", "options", "num_steps"),
    [
        ("DPMSolverMultistepScheduler", "dit", LINEAR, 40),
        ("UniPCMultistepScheduler", "dit", LINEAR, 40),
        ("EulerDiscreteScheduler", "dit", {**LINEAR, "timestep_spacing": "leading"}, 250),  # first order
        ("DPMSolverMultistepScheduler", "flow", FLOW, 40),
        ("UniPCMultistepScheduler", "flow", FLOW, 40),
    ],
)
def test_others_reach_the_same_data(name, objective, options, num_steps):
    """All solve one equation, whose solution for Gaussian data is known. The state of each has its own scale."""
    mean, std = 0.5, 0.3

    def perfect(x, t, y):
        t = t.double()[:, None, None, None]
        if objective == "flow":
            t = t / 1000
            offset = (x - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2)
            return t * offset - (mean + (1 - t) * std**2 * offset)
        a = linear_schedule().alpha_bar[t.long()]
        x0 = mean + a.sqrt() * std**2 * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    scheduler = getattr(diffusers, name)(**options)
    states = []
    options = {"shape": (1, 16, 16), "progress": False, "callback": states.append}
    out = sample(perfect, torch.zeros(4, dtype=torch.int64), num_steps, scheduler=scheduler, **options)
    assert out.mean() == pytest.approx(mean, abs=0.03) and out.std() == pytest.approx(std, rel=0.08)
    torch.testing.assert_close(states[-1].x0, out, rtol=0, atol=0.05)


def test_ddpm_takes_the_learned_variance(model):
    """The variance has a say, and an image's noise is its own: a batch changes nothing."""
    learned = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False, **LINEAR)
    fixed = diffusers.DDPMScheduler(clip_sample=False, **LINEAR)
    trained_for(model, "dit")
    runs = [sample(model, LABELS, 4, scheduler=s, seed=1, progress=False) for s in (learned, fixed)]
    assert not torch.allclose(*runs)
    alone = sample(model, LABELS[2:], 4, scheduler=learned, seed=1, first_index=2, progress=False)
    torch.testing.assert_close(alone[0], runs[0][2], rtol=1e-4, atol=1e-3)
    without = small_dit(grid=(4, 4), learn_sigma=False)
    with pytest.raises(ValueError, match="variance_type 'learned_range', but the model learned no variance; accepted"):
        sample(without, LABELS, 4, scheduler=learned, progress=False)


@pytest.mark.parametrize(
    ("scheduler", "objective", "message"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), "dit", "objective 'dit', which FlowMatchEulerDiscreteScheduler"),
        (ddim(), "flow", r"objective 'flow', which DDIMScheduler \(prediction_type 'epsilon'\) does not fit"),
        (ddim(prediction_type="v_prediction"), None, "prediction_type 'v_prediction', which no model here"),
        (ddim(beta_schedule="scaled_linear"), None, "another noise schedule .*beta_schedule='scaled_linear'"),
        (ddim(num_train_timesteps=500), None, "another noise schedule .*num_train_timesteps=500"),
        (ddim(rescale_betas_zero_snr=True), "dit", "another noise schedule .*rescale_betas_zero_snr=True"),
        (diffusers.EDMEulerScheduler(), "dit", "EDMEulerScheduler has another noise schedule"),
        (diffusers.DPMSolverMultistepScheduler(variance_type="learned"), "dit", "cuts every prediction to 3 channels"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "flow", "use_flow_sigmas=False"),
    ],
)
def test_what_does_not_fit_is_refused(model, scheduler, objective, message):
    with pytest.raises(ValueError, match=message):
        sample(trained_for(model, objective), LABELS, 2, scheduler=scheduler, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": "ddim10"}, "num_steps is 'ddim10'; accepted for a scheduler: a positive integer"),
        ({"method": "ddim"}, "method is 'ddim' beside a scheduler"),
        ({"clip": True}, "clip is True beside a scheduler"),
        ({"graph": True}, "graph is True beside a scheduler"),
        ({"scheduler": diffusers.DPMSolverMultistepScheduler(**LINEAR), "eta": 0.5}, "eta is 0.5, but DPMSolver"),
    ],
)
def test_options_beside_a_scheduler(model, options, message):
    with pytest.raises(ValueError, match=message):
        sample(trained_for(model, "dit"), LABELS, **{"num_steps": 4, "scheduler": ddim(), "progress": False, **options})


def test_eta_adds_noise(model):
    trained_for(model, "dit")
    runs = [sample(model, LABELS, 4, scheduler=ddim(), eta=eta, progress=False) for eta in (0.0, 0.5, 0.5)]
    assert torch.equal(runs[1], runs[2])
    assert all(not torch.allclose(a, b) for a, b in itertools.combinations(runs[:2], 2))
