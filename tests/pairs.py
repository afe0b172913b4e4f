"""The scripts' agents beside the oracles of reference.py: the same weights, the same random numbers."""

import contextlib
import copy
from unittest import mock

import reference
import torch

# Random numbers


@contextlib.contextmanager
def drawing_with(change):
    """Meanwhile torch.randn and its kin are what `change` makes of them."""
    with contextlib.ExitStack() as stack:
        for name in ("randn", "randn_like", "rand", "randint"):
            stack.enter_context(mock.patch.object(torch, name, change(getattr(torch, name))))
        yield


@contextlib.contextmanager
def recorded():
    """A list of what torch.randn, randn_like, rand and randint return meanwhile, in order."""
    numbers = []

    def recording(draw):
        def draw_and_record(*args, **kwargs):
            numbers.append(draw(*args, **kwargs))
            return numbers[-1].clone()

        return draw_and_record

    with drawing_with(recording):
        yield numbers


def assert_standard(numbers, steps=0):
    """Floats are from N(0, 1), whole numbers uniform in 0..steps-1; never the same ones twice."""
    for i, values in enumerate(numbers):
        n = values.numel()
        if values.is_floating_point():
            assert values.mean().abs() < 5 / n**0.5 and (values.var() - 1).abs() < 5 * (2 / n) ** 0.5
        else:
            assert values.unique().tolist() == list(range(steps)) and values.bincount().min() > 0.7 * n / steps
        assert not any(values.shape == other.shape and (values == other).all() for other in numbers[:i])


@contextlib.contextmanager
def replayed(*numbers):
    """Meanwhile torch.randn, randn_like, rand and randint return these tensors, in order and all of them."""
    left = list(numbers)

    def replaying(draw):
        def replay(*args, **kwargs):
            drawn, number = draw(*args, **kwargs), left.pop(0)
            assert number.shape == drawn.shape, f"{tuple(drawn.shape)} asked for, {tuple(number.shape)} comes"
            return number.to(drawn)

        return replay

    with drawing_with(replaying):
        yield
    assert not left


# Weights


def layers_of(network):
    """The layers of a network that is no pair of critics; each as a tuple of modules, over which the script splits the
    layer by its inputs, in the order in which the paper's code puts them together."""
    if hasattr(network, "net") or isinstance(network, torch.nn.Sequential):
        return [(part,) for part in getattr(network, "net", network) if hasattr(part, "weight")]
    trunk = [(part,) for part in network.trunk if hasattr(part, "weight")]
    if not hasattr(network, "time_layers"):
        return [(network.state_layer, network.action_layer), *trunk]
    first, _, second, time = network.time_layers
    if type(network).__module__ == "qsm":
        return [(first,), (second,), (network.action_layer, network.state_layer, time), *trunk]
    return [(first,), (second,), (network.state_layer, network.action_layer, time), *trunk]


def layer(parts):
    """(weight, bias) as in torch.nn.Linear, outputs x inputs; for twins, both critics'."""
    weight = torch.cat([p.weight if isinstance(p, torch.nn.Linear) else p.weight.mT for p in parts], dim=-1)
    (bias,) = (part.bias for part in parts if part.bias is not None)
    return weight.detach().clone(), (bias if bias.dim() == 1 else bias.squeeze(-2)).detach().clone()


def critics(twins):
    """The layers of both critics."""
    both = [layer(parts) for parts in layers_of(twins)]
    return [[(weight[i].clone(), bias[i].clone()) for weight, bias in both] for i in range(2)]


def policy(network):
    layers = [layer(parts) for parts in layers_of(network)]
    if not hasattr(network, "time_layers"):
        return layers
    if type(network).__module__ == "qsm":
        return network.frequencies.detach().clone(), layers[:2], layers[2:]
    return layers[:2], layers[2:]


def networks(agent):
    """Everything that an agent learns, in the oracle's form and under the oracle's names."""
    result = {}
    for name in ("policy", "ema_policy", "target_policy"):
        if hasattr(agent, name):
            result[name] = policy(getattr(agent, name))
    for name in ("critics", "target_critics"):
        if hasattr(agent, name):
            result[name] = critics(getattr(agent, name))
    for name in ("log_lambda", "log_alpha"):
        if hasattr(agent, name):
            result[name] = getattr(agent, name).detach().clone()
    return result


def with_gradients(network, gradients):
    """A copy of a network with gradients, in the order of its parameters, in their place."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.copy_(gradient)
    return network


def scatter(*modules):
    """Move parameters a little, so that averages and targets differ from the online networks."""
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p += 0.1 * torch.randn_like(p)


# Both


def oracle(agent):
    """The paper-literal version of an agent, from the weights that it has now."""
    return getattr(reference, f"{type(agent).__name__}Reference")(**networks(agent), args=agent.args)


def assert_same(agent, oracle, rtol=1e-9, atol=1e-11):
    for name, mine in networks(agent).items():
        for a, b in zip(reference.flat(mine), reference.flat(getattr(oracle, name)), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


def assert_same_update(agent, oracle, batch, rtol=1e-9, atol=1e-11):
    """One more update of both, with the same random numbers."""
    step = agent.updates
    with recorded() as numbers:
        agent.update(batch)
    assert agent.updates == step + 1
    oracle.update(batch, step, numbers)
    assert_same(agent, oracle, rtol, atol)


def assert_same_actions(agent, oracle, observations, explore, rtol=1e-9, atol=1e-11):
    with recorded() as numbers:
        actions = agent.act(observations, explore)
    assert actions.abs().max() <= 1 + 1e-12 and not actions.requires_grad
    torch.testing.assert_close(actions, oracle.act(observations, numbers, explore), rtol=rtol, atol=atol)


def random_batch(module, size=7, obs_dim=4, action_dim=2):
    return module.Batch(
        torch.randn(size, obs_dim),
        2 * torch.rand(size, action_dim) - 1,
        torch.randn(size, obs_dim),
        torch.randn(size),
        (torch.rand(size) < 0.4).to(torch.get_default_dtype()),
    )
