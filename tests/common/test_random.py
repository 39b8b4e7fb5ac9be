"""Named draws are functions of the seed and the names alone."""

import torch

from scaleot_core.common.random import generator


def draw(*names):
    return torch.rand(4, generator=generator(*names)).tolist()


def test_draw_is_a_function_of_seed_and_names_only():
    first = draw(3, "tuning", 7)
    torch.manual_seed(99)
    draw(3, "tuning", 8)
    assert draw(3, "tuning", 7) == first
    assert generator(0, "harmonizers").initial_seed() == 60932426638459748  # and the same in every process


def test_every_seed_and_name_has_its_own_draws():
    names = [(0,), (1,), (0, "a"), (0, "b"), (1, "a"), (0, "a", 0), (0, "a", 1), (0, "a", 10), (0, "b", 1)]
    assert len({tuple(draw(*each)) for each in names}) == len(names)


def test_named_draws_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    draw(0, "a")
    assert torch.equal(torch.rand(3), expected)
