"""The scripts' agents beside the oracles of reference.py: the same weights, as lists of layers."""

import reference
import torch


def weight_of(part):
    """Weights as in torch.nn.Linear, outputs x inputs; with two such matrices in the layer, both."""
    return part.weight if isinstance(part, torch.nn.Linear) else part.weight.mT


def layer(*linears):
    """(weight, bias) of one layer whose input is split over several."""
    weight, bias = torch.cat([weight_of(part) for part in linears], dim=-1), linears[0].bias
    return weight.detach().clone(), (bias if bias.dim() == 1 else bias.squeeze(-2)).detach().clone()


def layers(parts):
    """All linear layers among some modules."""
    return [layer(part) for part in parts if hasattr(part, "weight")]


def critics(twins):
    """The layers of both critics."""
    if hasattr(twins, "weights"):  # SAC, TD3
        both = [(weight.mT.detach(), bias.detach().squeeze(-2)) for weight, bias in zip(twins.weights, twins.biases)]
    elif hasattr(twins, "net"):  # QSM
        both = layers(twins.net)
    else:  # SDAC
        both = [layer(twins.state, twins.action), *layers(twins.trunk)]
    return [[(weight[i].clone(), bias[i].clone()) for weight, bias in both] for i in range(2)]


def plain_policy(policy):
    return layers(policy.net)


def sdac_policy(policy):
    time = [layer(policy.time[0]), layer(policy.time[2])]
    return time, [layer(policy.state, policy.action, policy.time[3]), *layers(policy.trunk)]


def qsm_policy(policy):
    parts = policy.action, policy.state, policy.time[3]
    first = (torch.cat([weight_of(part) for part in parts], dim=1).detach().clone(), layer(policy.state)[1])
    condition = [layer(policy.time[0]), layer(policy.time[2])]
    return policy.frequencies.detach().clone(), condition, [first, *layers(policy.trunk)]


def networks(agent):
    """Everything that an agent learns, in the oracle's form and under the oracle's names."""
    script = type(agent).__name__
    policy = {"SDAC": sdac_policy, "QSM": qsm_policy}.get(script, plain_policy)
    result = {"policy": policy(agent.policy), "critics": critics(agent.critics)}
    for name in ("ema_policy", "target_policy"):
        if hasattr(agent, name):
            result[name] = policy(getattr(agent, name))
    for name in ("ema_critics", "target_critics"):
        if hasattr(agent, name):
            result[name] = critics(getattr(agent, name))
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
