"""toy_rssm.py: each method against a closed form, the metrics on cases with a known answer, and the command line."""

import csv
import math

import pairs
import pytest
import torch
from conftest import run_folder

import toy_rssm as toy


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gaussian(mean=(0.2, -0.1), std=0.3):
    return toy.Gaussians(torch.tensor([mean]), torch.tensor([std]), torch.ones(1))


@torch.enable_grad()
def noised_score(target, a, signal, noise):
    """∇ log p_t of a target of Gaussians: means times signal, variances signal^2 std^2 + noise^2."""
    a = a.detach().requires_grad_(True)
    stds = (signal**2 * target.stds**2 + noise**2).sqrt()
    noised = toy.Gaussians(signal * target.means, stds, target.weights)
    return torch.autograd.grad(noised.log_prob(a).sum(), a)[0]


# Targets


@pytest.mark.parametrize("name", ["gmm", "moons", "rings"])
def test_targets_are_normalised_and_live_on_the_box(name):
    target = toy.make_target(name)
    x = torch.linspace(-1, 1, 1601)
    points = torch.stack(torch.meshgrid(x, x, indexing="ij"), dim=-1)
    mass = torch.stack([target.log_prob(row).exp() for row in points])
    assert torch.trapezoid(torch.trapezoid(mass, x), x).item() == pytest.approx(1, abs=2e-3)
    assert target.weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["gmm", "moons", "rings"])
def test_true_samples_follow_the_density(name):
    target = toy.make_target(name)
    samples = target.sample(200_000)
    assert toy.grid_kl(toy.cell_masses(target.log_prob), samples) < 0.01
    assert toy.mode_error(target, samples) < 0.005


@pytest.mark.parametrize("name", ["gmm", "moons", "rings"])
def test_energy_gradients_and_counters(name):
    target = toy.make_target(name)
    a = 1.6 * torch.rand(20, 3, 2) - 0.8
    energy, gradient = target.energy_gradient(a)
    assert target.energies == target.gradients == 60
    h = 1e-3
    for i, e in enumerate(torch.eye(2)):
        difference = (target.energy(a + h * e) - target.energy(a - h * e)) / (2 * h)
        torch.testing.assert_close(gradient[..., i], difference, rtol=0.05, atol=0.3)
    torch.testing.assert_close(energy, -target.log_prob(a))
    assert target.energies == 60 + 4 * 60 and target.gradients == 60


# RSSM and DSM


@pytest.mark.parametrize("t", [30, 60, 99])
def test_rssm_target_is_the_noised_score(t):
    """With M = 200,000 reverse samples, at proposals near and far from the modes."""
    target, schedule, steps = toy.make_target("gmm"), toy.Schedule(100), torch.full((4,), t)
    a_0 = torch.tensor([[-0.6, -0.6], [0.0, 0.4], [0.9, -0.9], [0.5, 0.5]])
    a_t = schedule.noised(a_0, steps, 0.5 * torch.randn(4, 2))
    u = torch.rand(4, 200_000, 2, dtype=torch.float64)
    estimate = toy.rssm_target(target.energy, schedule, a_t, steps, u)
    score = noised_score(target, a_t, schedule.sqrt_abar[t], schedule.sqrt_1m_abar[t])
    torch.testing.assert_close(estimate, -schedule.sqrt_1m_abar[t] * score, rtol=0.05, atol=0.05)


def test_reverse_samples_stay_in_the_box():
    seen, t = [], torch.arange(100)
    energy = lambda a: (seen.append(a), a[..., 0])[1]  # noqa: E731
    schedule, u = toy.Schedule(100), torch.rand(100, 50, 2, dtype=torch.float64)
    a_t = schedule.noised(2 * torch.rand(100, 2) - 1, t, 1.5 * torch.randn(100, 2))
    toy.rssm_target(energy, schedule, a_t, t, u)
    assert seen[0].shape == (100, 50, 2) and seen[0].abs().max() <= 1 + 1e-5


def test_schedule_and_posterior():
    schedule = toy.Schedule(50)
    torch.testing.assert_close(schedule.sqrt_abar**2 + schedule.sqrt_1m_abar**2, torch.ones(50))
    torch.testing.assert_close(schedule.sqrt_1m_abar / schedule.sqrt_abar, schedule.reverse_std)
    assert schedule.reverse_std[0].item() == pytest.approx(0.01) and schedule.reverse_std[-1].item() == pytest.approx(
        10
    )
    assert schedule.std[0] == 0 and schedule.mean_a0[0] == 1
    # q(a_{t-1}|a_0) is recovered by averaging the posterior over q(a_t|a_0)
    mean = schedule.mean_a0[1:] + schedule.mean_at[1:] * schedule.sqrt_abar[1:]
    variance = schedule.mean_at[1:] ** 2 * schedule.sqrt_1m_abar[1:] ** 2 + schedule.std[1:] ** 2
    torch.testing.assert_close(mean, schedule.sqrt_abar[:-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, schedule.sqrt_1m_abar[:-1] ** 2, rtol=1e-3, atol=1e-6)


def test_dsm_learns_the_closed_form_score_of_a_gaussian():
    target = gaussian()
    args = toy.Args(iterations=1200, batch_size=512, diffusion_steps=40, hidden_size=64, samples=100)
    _, score = toy.run_dsm(target, args)
    schedule = toy.Schedule(40)
    for t in (15, 25, 39):
        a_t = schedule.noised(target.sample(2000), torch.full((2000,), t), torch.randn(2000, 2))
        a = a_t / schedule.sqrt_abar[t]
        exact = noised_score(target, a, 1.0, schedule.reverse_std[t])
        assert ((score(a, t).detach() - exact).norm() / exact.norm()).item() < 0.15


def test_the_sampler_denoises_a_gaussian():
    """From the exact prediction of the noise, given the times of training, (t + 1)/T."""
    target, schedule, steps = gaussian(), toy.Schedule(10), 10

    def network(a, time):
        t = round(time[0].item() * steps) - 1
        signal, noise = schedule.sqrt_abar[t], schedule.sqrt_1m_abar[t]
        return noise * (a - signal * target.means) / (signal**2 * target.stds**2 + noise**2)

    a = toy.denoise(network, schedule, 50_000)
    torch.testing.assert_close(a.mean(0), target.means[0], rtol=0, atol=0.01)  # a step off moves it by 0.03


def test_what_remains_of_gmms_mode_error_without_a_misfit():
    """0.014 with the exact noise, the sampler's own; 0.23 with QSM's target, which is another function."""
    target, schedule, steps = toy.make_target("gmm"), toy.Schedule(100), 100

    def exact(a, time):
        t = round(time[0].item() * steps) - 1
        return -schedule.sqrt_1m_abar[t] * noised_score(target, a, schedule.sqrt_abar[t], schedule.sqrt_1m_abar[t])

    def qsm(a, time):
        return schedule.sqrt_1m_abar[round(time[0].item() * steps) - 1] * target.energy_gradient(a)[1]

    assert toy.mode_error(target, toy.denoise(exact, schedule, 50_000)) == pytest.approx(0.014, abs=0.006)
    assert toy.mode_error(target, toy.denoise(qsm, schedule, 20_000)) == pytest.approx(0.23, abs=0.02)


@pytest.mark.parametrize(
    "method, few, energies, gradients",
    [
        ("rssm", {}, 2 * 4 * 3, 0),
        ("dsm", {}, 0, 0),
        ("qsm", {}, 2 * 4, 2 * 4),
        ("idem", {"outer": 2, "inner": 3, "k": 5, "batch": 4}, 2 * 3 * 4 * 5, 2 * 3 * 4 * 5),
        ("langevin", {"n": 3}, 50 * 3, 50 * 3),
        ("fab", {"iterations": 2, "batch": 16}, 2 * 16 * 5, 2 * 16 * 5),  # the start, and twice two leapfrogs
        ("true", {}, 0, 0),
    ],
)
def test_every_method_gives_samples_and_counts_its_energies(method, few, energies, gradients):
    sizes = {"batch_size": 4, "num_reverse_samples": 3, "diffusion_steps": 5, "hidden_size": 8}
    target, args = toy.make_target("gmm"), toy.Args(samples=50, iterations=2, **sizes)
    samples, score = toy.METHODS[method].run(target, args, **few)
    assert samples.shape == (50, 2) and samples.isfinite().all()
    assert score is None or score(samples).shape == (50, 2)
    assert (target.energies, target.gradients) == (energies, gradients)


def test_true_score_is_that_of_the_noised_density():
    target = toy.make_target("gmm")
    _, score = toy.run_true(target, toy.Args())
    a = target.sample(200) + toy.SHOWN_NOISE * torch.randn(200, 2)
    exact = noised_score(target, a, 1.0, toy.SHOWN_NOISE)
    assert ((score(a) - exact).norm() / exact.norm()).item() < 0.02
    assert target.energies == target.gradients == 0


# iDEM


@pytest.mark.parametrize("sigma", [0.1, 0.4])
def test_idem_score_is_the_noised_score_for_large_k_and_biased_for_small(sigma):
    target = toy.make_target("gmm")
    x = target.sample(16) + sigma * torch.randn(16, 2)
    exact, sigmas = noised_score(target, x, 1.0, sigma), torch.full((16, 1), sigma)

    def bias(k, repeats):
        estimates = [toy.idem_score(target.energy_gradient, x, sigmas, torch.randn(16, k, 2)) for _ in range(repeats)]
        return ((torch.stack(estimates).mean(0) - exact).norm() / exact.norm()).item()

    assert bias(50_000, 8) < 0.1
    assert bias(4, 500) > 3 * bias(4000, 5)


# Langevin


def test_langevin_has_the_stationary_variance_of_its_discretisation():
    """On N(mean, v I) the chain is linear: its variance is v / (1 - step/(2v)), a bias of order step."""
    std, step = 0.3, 0.06
    target = gaussian(std=std)
    a = toy.langevin(target.energy_gradient, torch.zeros(100_000, 2), step, 40)
    expected = std**2 / (1 - step / (2 * std**2))
    assert a.var(0).mean().item() == pytest.approx(expected, rel=0.02)
    assert abs(expected / std**2 - 1) > 0.3  # far from v: the test sees the bias
    torch.testing.assert_close(a.mean(0), torch.tensor([0.2, -0.1]), rtol=0, atol=0.01)


# FAB


def trained_a_little(flow):
    """A flow that is not the identity."""
    for net in flow.nets:
        torch.nn.init.normal_(net[-1].weight, std=0.15)
        torch.nn.init.normal_(net[-1].bias, std=0.15)
    return flow


def test_flow_log_density_is_the_change_of_variables():
    flow, n = trained_a_little(toy.RealNVP(layers=4, hidden=16)), 5
    z = 0.5 * torch.randn(n, 2)

    def forward(z):
        with pairs.replayed(2 * z):
            return flow.sample(len(z))

    a = forward(z)
    assert (a - z).abs().max() > 0.05
    for i in range(n):
        jacobian = torch.autograd.functional.jacobian(lambda x: forward(x[None])[0], z[i])
        base = torch.distributions.Normal(0.0, 0.5).log_prob(z[i]).sum()
        assert flow.log_prob(a[i : i + 1]).item() == pytest.approx((base - jacobian.det().abs().log()).item(), abs=1e-4)


def test_ais_weights_are_unbiased():
    """From q = N(0, 0.5^2 I) to f = 3.7 exp(-|a - m|^2 / (2 0.3^2)): the mean weight is ∫f = 3.7 * 2 pi 0.3^2."""
    m, n = torch.tensor([0.4, -0.3]), 200_000

    def densities(a):
        log_q = -2 * (a**2).sum(1) - math.log(2 * math.pi * 0.25)
        return toy.Densities(log_q, -4 * a, math.log(3.7) - ((a - m) ** 2).sum(1) / 0.18, -(a - m) / 0.09)

    for betas in ([1.0], [0.25, 0.5, 0.75, 1.0]):
        _, log_w, acceptance = toy.annealed_importance_sampling(0.5 * torch.randn(n, 2), densities, betas, 0.15)
        weights = log_w.exp()
        error = 4 * weights.std().item() / math.sqrt(n)
        assert weights.mean().item() == pytest.approx(3.7 * 2 * math.pi * 0.09, abs=error)
        assert error < 0.05
    assert 0.5 < acceptance < 1


def test_ais_moves_samples_towards_its_end():
    def densities(a):
        return toy.Densities(-2 * (a**2).sum(1), -4 * a, -((a - 0.8) ** 2).sum(1) / 0.02, -(a - 0.8) / 0.01)

    a, log_w, _ = toy.annealed_importance_sampling(
        0.5 * torch.randn(20_000, 2), densities, [i / 10 for i in range(1, 11)], 0.1
    )
    weights = torch.softmax(log_w, 0)
    torch.testing.assert_close((weights[:, None] * a).sum(0), torch.tensor([0.8, 0.8]), rtol=0, atol=0.05)


# Metrics


def test_kl_of_a_known_case():
    """P uniform on the left half, Q uniform on the box: KL = log 2. And P equal to Q: 0."""
    left = torch.zeros(40, 40, dtype=torch.float64)
    left[:20] = 1 / 800
    n = 2_000_000
    assert toy.grid_kl(left, 2 * torch.rand(n, 2) - 1) == pytest.approx(math.log(2), abs=0.002)
    everywhere = torch.full((40, 40), 1 / 1600, dtype=torch.float64)
    assert toy.grid_kl(everywhere, 2 * torch.rand(n, 2) - 1) == pytest.approx(0, abs=0.001)
    outside = torch.cat([2 * torch.rand(n // 2, 2) - 1, torch.full((n // 2, 2), 3.0)])  # half of the samples lost
    assert toy.grid_kl(everywhere, outside) == pytest.approx(math.log(2), abs=0.002)


def test_kl_of_two_gaussians():
    """KL(N(m1, s1^2 I)|N(m2, s2^2 I)) in closed form against the grid."""
    p, q = gaussian((0.1, 0.0), 0.2), gaussian((0.0, 0.1), 0.25)
    exact = 2 * math.log(0.25 / 0.2) + (2 * 0.2**2 + 0.02) / (2 * 0.25**2) - 1
    assert toy.grid_kl(toy.cell_masses(p.log_prob), q.sample(1_000_000)) == pytest.approx(exact, rel=0.05)


def test_mode_error():
    target = toy.make_target("gmm")
    assert toy.mode_error(target, target.sample(200_000)) < 0.004
    only_first = target.means[:1].expand(1000, 2)
    assert toy.mode_error(target, only_first) == pytest.approx(1 - 0.35, abs=1e-5)


# Command line


def table(folder):
    with open(folder / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "peak_mb")} for row in csv.DictReader(file)]


def test_a_run_leaves_picture_and_table_and_repeats_itself(run, monkeypatch, capsys, tmp_path):
    """First as a user runs it, then in this process."""
    flags = "--target moons --methods rssm dsm langevin --iterations 50 --samples 2000 --diffusion-steps 20"
    flags += " --batch-size 64 --num-reverse-samples 16 --hidden-size 32"
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    process = run("toy_rssm", *flags.split(), cwd=first, OMP_NUM_THREADS=str(torch.get_num_threads()))
    assert process.returncode == 0, process.stderr
    monkeypatch.chdir(second)
    monkeypatch.setattr("sys.argv", ["toy_rssm.py", *flags.split()])
    toy.main()
    tables = []
    for path, output in ((first, process.stdout), (second, capsys.readouterr().out)):
        folder = run_folder(path)
        assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.csv", "picture.png"}
        assert folder.name in output and "mode error" in output
        tables.append(table(folder))
    assert tables[0] == tables[1]
    assert [row["method"] for row in tables[0]] == ["rssm", "dsm", "langevin", "true"]
    assert tables[0][0]["gradients"] == "0" and int(tables[0][0]["energies"]) == 50 * 64 * 16


@pytest.mark.parametrize(
    "arguments, word",
    [
        ("--iterations 0", "iterations"),
        ("--diffusion-steps 1", "diffusion_steps"),
        ("--target cube", "--target"),
        ("--methods rssm nonsense", "--methods"),
        ("--methods", "methods"),
        ("--samples many", "--samples"),
        ("--sample 3", "--samples"),
    ],
)
def test_bad_input(monkeypatch, capsys, tmp_path, arguments, word):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["toy_rssm.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        toy.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and word in out + err
    assert not list(tmp_path.iterdir())
