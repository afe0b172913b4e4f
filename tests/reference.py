"""The papers' algorithms, slow and obvious: the oracle for correctness and the baseline for speed.

Nothing is imported from the scripts. Networks are lists of (weight, bias) pairs applied to concatenated inputs,
gradients come from autograd on the loss as the paper prints it, Adam is written out. Everything is float64 unless a
caller passes float32 weights. Redundancy is kept on purpose: states repeated for every particle and every reverse
sample, and M policy passes, as in SDAC's official code.

`update` and `act` take their random numbers as a list of tensors, in the order in which the script draws them; all of
them have to be used.
"""

import math

import torch

PI = math.pi


# Pieces that several algorithms share


def mish(x):
    return x * torch.tanh(torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0))  # tanh of a stable softplus


def relu(x):
    return x.clamp(min=0)


def mlp(layers, x, activation):
    """A network given as [(weight, bias), ...], linear at the end."""
    for weight, bias in layers[:-1]:
        x = activation(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


def flat(network):
    """All tensors of a network given as nested lists and tuples."""
    return [network] if torch.is_tensor(network) else [leaf for part in network for leaf in flat(part)]


class Adam:
    """Kingma and Ba's Algorithm 1 with eps 1e-8."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.t = parameters, lr, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    def step(self, loss):
        gradients = torch.autograd.grad(loss, self.parameters)
        self.t += 1
        with torch.no_grad():
            for p, g, m, v in zip(self.parameters, gradients, self.m, self.v):
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g * g)
                m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
                p -= self.lr * m_hat / (v_hat.sqrt() + 1e-8)


def moving_average(slow, fast, tau):
    with torch.no_grad():
        for s, f in zip(flat(slow), flat(fast)):
            s.copy_((1 - tau) * s + tau * f)


# SDAC, arXiv 2502.00361


class Diffusion:
    """The textbook quantities of DDPM (Ho et al., 2020), t = 0..T-1."""

    def __init__(self, betas):
        self.beta = [float(b) for b in betas]
        self.steps = len(self.beta)
        self.abar = []
        for t in range(self.steps):
            self.abar.append((self.abar[-1] if t else 1.0) * (1 - self.beta[t]))

    def abar_before(self, t):
        return self.abar[t - 1] if t > 0 else 1.0

    def posterior(self, a_t, a_0, t):
        """Mean and standard deviation of q(a_{t-1} | a_t, a_0), Ho et al. equations (6) and (7)."""
        beta, abar, before = self.beta[t], self.abar[t], self.abar_before(t)
        mean = (math.sqrt(before) * beta * a_0 + math.sqrt(1 - beta) * (1 - before) * a_t) / (1 - abar)
        return mean, math.sqrt(beta * (1 - before) / (1 - abar))


def sdac_betas(steps, power=1):
    first, last = 1e-4 ** (1 / power), 0.999 ** (1 / power)
    return [0.8 * (first + (last - first) * t / (steps - 1)) ** power for t in range(steps)]


def sdac_time_features(t, dim=16):
    """Sinusoidal encoding of step indices t (rows,): sines and cosines over sqrt(dim)."""
    half = dim // 2
    columns = [f(t * 10_000 ** (-i / half)) / math.sqrt(dim) for f in (torch.sin, torch.cos) for i in range(half)]
    return torch.stack(columns, dim=-1)


def sdac_noise_prediction(policy, observations, a_t, t):
    """eps_theta on rows: policy = (time layers, layers); t (rows,) as a float tensor."""
    time_layers, layers = policy
    return mlp(layers, torch.cat([observations, a_t, mlp(time_layers, sdac_time_features(t), mish)], dim=1), mish)


def sdac_q(critic, observations, actions):
    return mlp(critic, torch.cat([observations, actions], dim=1), mish)[:, 0]


def sdac_min_q(critics, observations, actions):
    return torch.minimum(sdac_q(critics[0], observations, actions), sdac_q(critics[1], observations, actions))


def sdac_truncated(u, mean, spread, bound):
    """Noise whose reverse sample mean - spread * noise lies within the bound: quantiles u of the normal cut to that."""
    normal = torch.distributions.Normal(torch.zeros_like(u), torch.ones_like(u))
    low, high = normal.cdf((mean - bound) / spread), normal.cdf((mean + bound) / spread)
    return normal.icdf(low + u * (high - low)).to(mean.dtype)  # u is in float64 always


class SDACReference:
    """State and update of SDAC. `policy` = (time layers, layers), `critics` = two lists of layers.

    The random numbers of an update: for each of two samplings (s' for the critics' target, s for the proposal) those of
    `best_of_n` and then exploration noise (B, d); then t (B,), noise for a_t (B, d) and for the reverse samples
    (B, M, d). The first sampling's may stand alone, if the policy's step is not due; with the others there, its loss is
    computed in any case, as in the official code.
    """

    def __init__(self, policy, critics, ema_policy, target_critics, log_lambda, args):
        self.args = args
        self.policy, self.critics = policy, critics
        self.ema_policy, self.target_critics = ema_policy, target_critics
        self.log_lambda = log_lambda
        for tensor in [*flat(policy), *flat(critics), log_lambda]:
            tensor.requires_grad_(True)
        self.diffusion = Diffusion(sdac_betas(args.diffusion_steps, args.beta_power))
        self.policy_adam = Adam(flat(policy), args.policy_lr)
        self.critic_adams = [Adam(flat(critic), args.q_lr) for critic in critics]
        self.lambda_adam = Adam([log_lambda], args.lambda_lr)

    @property
    def temperature(self):
        return self.log_lambda.detach().exp()

    @property
    def exploration_std(self):
        return self.args.exploration_noise * self.temperature / self.args.temperature

    @torch.no_grad()
    def best_of_n(self, policy, observations, n, noise):
        """n particles per state, each denoised on its own row; the best by min(Q1, Q2).

        From `noise` it takes pairs of tensors, the start (states, n, d) and the noise of the steps t = 0..T-1,
        (T, states, n, d), until there is one state's for every observation.
        """
        starts, zs = [], []
        while sum(len(start) for start in starts) < len(observations):
            starts.append(noise.pop(0))
            zs.append(noise.pop(0))
        start, z = torch.cat(starts), torch.cat(zs, dim=1)
        assert start.shape[1] == n
        rows = observations.repeat_interleave(n, dim=0)
        a_t, z = 0.5 * start.reshape(len(rows), -1), z.reshape(len(z), len(rows), -1)
        for t in range(self.diffusion.steps - 1, -1, -1):
            t_rows = torch.full((len(rows),), float(t), dtype=rows.dtype)
            eps = sdac_noise_prediction(policy, rows, a_t, t_rows)
            abar = self.diffusion.abar[t]
            a_0 = ((a_t - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clamp(-1, 1)
            mean, std = self.diffusion.posterior(a_t, a_0, t)
            a_t = mean + self.args.denoising_noise * std * z[t]
        q = sdac_min_q(self.critics, rows, a_t).reshape(-1, n)
        particles = a_t.reshape(len(q), n, -1)
        return torch.stack([particles[i, int(q[i].argmax())] for i in range(len(q))])

    def explored(self, actions, eps):
        return (actions + self.exploration_std * eps).clamp(-1, 1)

    def act(self, observations, noise, explore):
        noise = list(noise)
        actions = self.best_of_n(self.ema_policy, observations, self.args.num_particles, noise)
        if explore:
            actions = self.explored(actions, noise.pop(0))
        assert not noise
        return actions

    def policy_loss(self, batch, noise):
        """Equation (6) in noise prediction, self-normalised, with M policy passes for each (s, a_t)."""
        args, a_0 = self.args, batch.actions
        if args.proposal == "policy":
            a_0 = self.best_of_n(self.policy, batch.observations, args.num_particles, noise)
            a_0 = self.explored(a_0, noise.pop(0))
        t, forward, reverse = noise.pop(0), noise.pop(0), noise.pop(0)
        m, dim = args.num_reverse_samples, a_0.shape[1]
        abar = torch.tensor(self.diffusion.abar, dtype=a_0.dtype)[t][:, None]
        a_t = abar.sqrt() * a_0 + (1 - abar).sqrt() * forward
        wide = lambda x: x.repeat_interleave(m, dim=0)  # noqa: E731
        eps = reverse.reshape(-1, dim)
        with torch.no_grad():
            if args.bounded_reverse_sampling:
                eps = sdac_truncated(eps, wide(a_t / abar.sqrt()), wide((1 / abar - 1).sqrt()), args.reverse_bound)
            samples = (wide(a_t / abar.sqrt()) - wide((1 / abar - 1).sqrt()) * eps).clamp(-1, 1)
            q = sdac_min_q(self.critics, wide(batch.observations), samples).reshape(-1, m) / self.temperature
            weights = torch.exp(q - torch.logsumexp(q, dim=1, keepdim=True))
        predicted = sdac_noise_prediction(self.policy, wide(batch.observations), wide(a_t), wide(t.to(a_0.dtype)))
        return (weights.reshape(-1, 1) * (predicted - eps) ** 2).sum() / (len(a_0) * dim)

    def update(self, batch, step, noise):
        args, std, noise = self.args, self.exploration_std, list(noise)
        with torch.no_grad():
            next_actions = self.best_of_n(self.policy, batch.next_observations, args.target_particles, noise)
            eps = noise.pop(0)
            next_actions = self.explored(next_actions, args.target_noise * eps)
            next_q = sdac_min_q(self.target_critics, batch.next_observations, next_actions)
            if args.soft_critic:
                normal = torch.distributions.Normal(torch.zeros_like(std), std)
                next_q = next_q - self.temperature * normal.log_prob(std * eps).sum(1)
            y = args.reward_scale * batch.rewards + args.gamma * (1 - batch.dones) * next_q
        critic_losses = [((sdac_q(c, batch.observations, batch.actions) - y) ** 2).mean() for c in self.critics]
        policy_loss = self.policy_loss(batch, noise) if noise else None
        assert not noise

        for adam, loss in zip(self.critic_adams, critic_losses):
            adam.step(loss)
        if step % args.policy_frequency == 0:
            begin, end = args.policy_lr_decay_begin, args.policy_lr_decay_end
            fraction = (self.policy_adam.t - begin) / (end - begin)
            fraction = 0.0 if fraction < 0 else 1.0 if fraction > 1 else fraction
            self.policy_adam.lr = (1 - fraction) * args.policy_lr + fraction * args.policy_lr_end
            self.policy_adam.step(policy_loss)
        if step % args.lambda_frequency == 0:
            dim = batch.actions.shape[1]
            entropy = dim / 2 * torch.log(2 * PI * math.e * std**2)
            self.lambda_adam.step((self.log_lambda * (entropy - args.target_entropy_scale * dim)).sum())
        if step % args.policy_frequency == 0:
            moving_average(self.ema_policy, self.policy, args.tau)
            moving_average(self.target_critics, self.critics, args.tau)


# SAC, arXiv 1812.05905


class SACReference:
    """`policy` and the two `critics` are lists of layers; the policy's last layer gives means, then log deviations.

    The random numbers of an update: noise (B, d) for a' and for a.
    """

    def __init__(self, policy, critics, target_critics, log_alpha, args):
        self.args = args
        self.policy, self.critics, self.target_critics, self.log_alpha = policy, critics, target_critics, log_alpha
        for tensor in [*flat(policy), *flat(critics), log_alpha]:
            tensor.requires_grad_(True)
        self.policy_adam = Adam(flat(policy), args.policy_lr)
        self.critic_adams = [Adam(flat(critic), args.q_lr) for critic in critics]
        self.alpha_adam = Adam([log_alpha], args.alpha_lr)

    def sample(self, observations, eps):
        """Action and log-density by torch's own change of variables."""
        output = mlp(self.policy, observations, relu)
        dim = output.shape[1] // 2
        mean, std = output[:, :dim], output[:, dim:].clamp(-20, 2).exp()
        u = mean + std * eps
        transform = torch.distributions.transforms.TanhTransform()
        log_prob = torch.distributions.Normal(mean, std).log_prob(u)
        return torch.tanh(u), (log_prob - transform.log_abs_det_jacobian(u, torch.tanh(u))).sum(1)

    def q(self, critic, observations, actions):
        return mlp(critic, torch.cat([observations, actions], dim=1), relu)[:, 0]

    @torch.no_grad()
    def act(self, observations, noise, explore):
        if explore:
            (eps,) = noise
            return self.sample(observations, eps)[0]
        assert not noise
        output = mlp(self.policy, observations, relu)
        return torch.tanh(output[:, : output.shape[1] // 2])

    def update(self, batch, step, noise):
        args, (next_eps, eps) = self.args, noise
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, next_log_prob = self.sample(batch.next_observations, next_eps)
            next_qs = [self.q(c, batch.next_observations, next_actions) for c in self.target_critics]
            soft_value = torch.minimum(*next_qs) - alpha * next_log_prob
            y = batch.rewards + args.gamma * (1 - batch.dones) * soft_value
        for critic, adam in zip(self.critics, self.critic_adams):
            adam.step(((self.q(critic, batch.observations, batch.actions) - y) ** 2).mean())
        actions, log_prob = self.sample(batch.observations, eps)
        q = torch.minimum(*(self.q(c, batch.observations, actions) for c in self.critics))
        self.policy_adam.step((alpha * log_prob - q).mean())
        entropy_gap = (log_prob.detach() - batch.actions.shape[1]).mean()
        self.alpha_adam.step(-self.log_alpha.exp() * entropy_gap)
        moving_average(self.target_critics, self.critics, args.tau)


# TD3, arXiv 1802.09477


class TD3Reference:
    """`policy` and the two `critics` are lists of layers. The random numbers of an update: noise (B, d) for a'."""

    def __init__(self, policy, critics, target_policy, target_critics, args):
        self.args = args
        self.policy, self.critics = policy, critics
        self.target_policy, self.target_critics = target_policy, target_critics
        for tensor in [*flat(policy), *flat(critics)]:
            tensor.requires_grad_(True)
        self.policy_adam = Adam(flat(policy), args.learning_rate)
        self.critic_adams = [Adam(flat(critic), args.learning_rate) for critic in critics]

    def q(self, critic, observations, actions):
        return mlp(critic, torch.cat([observations, actions], dim=1), relu)[:, 0]

    @torch.no_grad()
    def act(self, observations, noise, explore):
        actions = torch.tanh(mlp(self.policy, observations, relu))
        if explore:
            (eps,) = noise
            return (actions + self.args.exploration_noise * eps).clamp(-1, 1)
        assert not noise
        return actions

    def update(self, batch, step, noise):
        args, (eps,) = self.args, noise
        with torch.no_grad():
            eps = (args.policy_noise * eps).clamp(-args.noise_clip, args.noise_clip)
            next_actions = torch.tanh(mlp(self.target_policy, batch.next_observations, relu)) + eps
            next_actions = next_actions.clamp(-1, 1)
            next_qs = [self.q(c, batch.next_observations, next_actions) for c in self.target_critics]
            y = batch.rewards + args.gamma * (1 - batch.dones) * torch.minimum(*next_qs)
        for critic, adam in zip(self.critics, self.critic_adams):
            adam.step(((self.q(critic, batch.observations, batch.actions) - y) ** 2).mean())
        if step % args.policy_frequency == 0:
            actions = torch.tanh(mlp(self.policy, batch.observations, relu))
            self.policy_adam.step(-self.q(self.critics[0], batch.observations, actions).mean())
            moving_average(self.target_policy, self.policy, args.tau)
            moving_average(self.target_critics, self.critics, args.tau)


# QSM, arXiv 2312.11752


def qsm_alphas(steps, b_min=0.1, b_max=10.0):
    return [math.exp(-b_min / steps - 0.5 * (b_max - b_min) * (2 * t - 1) / steps**2) for t in range(1, steps + 1)]


class QSMReference:
    """`policy` = (frequencies, condition layers, layers); `critics` are two lists of layers.

    The random numbers of `act`: the start (B, d), noise of the steps t = 0..T-1 (T, B, d) and exploration noise (B, d).
    Those of an update: the same for s', then t (B,) and noise for a_t (B, d).
    """

    def __init__(self, policy, critics, target_critics, args):
        self.args = args
        self.policy, self.critics, self.target_critics = policy, critics, target_critics
        for tensor in [*flat(policy), *flat(critics)]:
            tensor.requires_grad_(True)
        self.alpha = qsm_alphas(args.diffusion_steps)
        self.abar = [math.prod(self.alpha[: t + 1]) for t in range(args.diffusion_steps)]
        self.policy_adam = Adam(flat(policy), args.policy_lr)
        self.critic_adams = [Adam(flat(critic), args.q_lr) for critic in critics]

    def noise_prediction(self, observations, a_t, t):
        """t (rows,) as floats."""
        frequencies, condition, layers = self.policy
        angles = 2 * PI * t[:, None] * frequencies[None]
        c = mlp(condition, torch.cat([torch.cos(angles), torch.sin(angles)], dim=1), mish)
        return mlp(layers, torch.cat([a_t, observations, c], dim=1), mish)

    def q(self, critic, observations, actions):
        return mlp(critic, torch.cat([observations, actions], dim=1), relu)[:, 0]

    @torch.no_grad()
    def act(self, observations, noise, explore):
        a, z, *noise = noise
        for t in range(self.args.diffusion_steps - 1, -1, -1):
            eps = self.noise_prediction(observations, a, torch.full((len(a),), float(t), dtype=a.dtype))
            alpha, abar = self.alpha[t], self.abar[t]
            a = (a - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha)
            if t > 0:
                a = a + math.sqrt(1 - alpha) * z[t]
            a = a.clamp(-1, 1)
        if explore:
            (exploration,) = noise
            return (a + self.args.exploration_noise * exploration).clamp(-1, 1)
        assert not noise
        return a

    def update(self, batch, step, noise):
        args, (*acting, t, eps) = self.args, noise
        with torch.no_grad():
            next_actions = self.act(batch.next_observations, acting, explore=True)
            next_qs = [self.q(c, batch.next_observations, next_actions) for c in self.target_critics]
            y = batch.rewards + args.gamma * (1 - batch.dones) * torch.minimum(*next_qs)
        for critic, adam in zip(self.critics, self.critic_adams):
            adam.step(((self.q(critic, batch.observations, batch.actions) - y) ** 2).mean())
        moving_average(self.target_critics, self.critics, args.tau)

        abar = torch.tensor(self.abar, dtype=batch.actions.dtype)[t][:, None]
        a_t = (abar.sqrt() * batch.actions + (1 - abar).sqrt() * eps).requires_grad_(True)
        gradients = [torch.autograd.grad(self.q(c, batch.observations, a_t).sum(), a_t)[0] for c in self.critics]
        gradient = (gradients[0] + gradients[1]) / 2
        predicted = self.noise_prediction(batch.observations, a_t.detach(), t.to(a_t.dtype))
        self.policy_adam.lr = (
            args.policy_lr * 0.5 * (1 + math.cos(PI * min(self.policy_adam.t / args.policy_lr_steps, 1)))
        )
        self.policy_adam.step(((predicted + args.q_gradient_scale * gradient) ** 2).mean())
