"""The scripts' agents beside the oracles of reference.py: the same weights, as lists of layers."""

import reference
import torch


def layer(*linears):
    """(weight, bias) of one layer whose input is split over several nn.Linear."""
    weight = torch.cat([part.weight for part in linears], dim=1)
    return weight.detach().clone(), linears[0].bias.detach().clone()


def layers(network):
    """All layers of a plain network."""
    return [layer(part) for part in network.net if isinstance(part, torch.nn.Linear)]


def trunk_layers(trunk):
    return [layer(part) for part in trunk if isinstance(part, torch.nn.Linear)]


def sdac_critic(critic):
    return [layer(critic.state, critic.action), *trunk_layers(critic.trunk)]


def sdac_policy(policy):
    time = [layer(policy.time[0]), layer(policy.time[2])]
    return time, [layer(policy.state, policy.action, policy.time[3]), *trunk_layers(policy.trunk)]


def qsm_policy(policy):
    weight = torch.cat([policy.action.weight, policy.state.weight, policy.time[3].weight], dim=1).detach().clone()
    first = (weight, policy.state.bias.detach().clone())
    condition = [layer(policy.time[0]), layer(policy.time[2])]
    return policy.frequencies.detach().clone(), condition, [first, *trunk_layers(policy.trunk)]


def networks(agent):
    """Everything that an agent learns, in the oracle's form and under the oracle's names."""
    script = type(agent).__name__
    policy = {"SDAC": sdac_policy, "QSM": qsm_policy}.get(script, layers)
    critic = sdac_critic if script == "SDAC" else layers
    result = {"policy": policy(agent.policy), "critics": [critic(c) for c in agent.critics]}
    for name in ("ema_policy", "target_policy"):
        if hasattr(agent, name):
            result[name] = policy(getattr(agent, name))
    for name in ("ema_critics", "target_critics"):
        if hasattr(agent, name):
            result[name] = [critic(c) for c in getattr(agent, name)]
    for name in ("log_lambda", "log_alpha"):
        if hasattr(agent, name):
            result[name] = getattr(agent, name).detach().clone()
    return result


def oracle(agent):
    """The paper-literal version of an agent, from the weights that it has now."""
    return getattr(reference, f"{type(agent).__name__}Reference")(**networks(agent), args=agent.args)


def assert_same(agent, oracle, rtol=1e-9, atol=1e-11):
    for name, mine in networks(agent).items():
        for a, b in zip(reference.flat(mine), reference.flat(getattr(oracle, name)), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def scatter(*modules):
    """Move parameters a little, so that averages and targets differ from the online networks."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p += 0.1 * torch.randn_like(p)


def random_batch(module, size=7, obs_dim=4, action_dim=2):
    return module.Batch(
        torch.randn(size, obs_dim),
        2 * torch.rand(size, action_dim) - 1,
        torch.randn(size, obs_dim),
        torch.randn(size),
        (torch.rand(size) < 0.4).to(torch.get_default_dtype()),
    )
