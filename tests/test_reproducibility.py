"""A generator for each image, also where one was given for several."""

import torch
from tiny import generators

from llamagen_hf.reproducibility import clone, image_generators, next_generators, told_apart


def numbers(generator: torch.Generator) -> list[float]:
    return torch.rand(3, generator=generator).tolist()


def test_images_without_a_generator_get_seeds_of_their_own():
    seeds = [each.initial_seed() for each in image_generators(None, 3)]
    assert len(set(seeds)) == 3


def test_candidates_share_the_generator_of_their_image():
    one, other = generators(0, 1)
    assert image_generators([one, other], 2, num_candidates=2) == [one, one, other, other]
    assert image_generators(one, 2) == [one, one]


def test_images_that_share_a_generator_are_told_apart():
    one, other = generators(0, 1)
    first, second, third, fourth = told_apart([one, one, other, one])
    assert first is one and third is other
    drawn = [numbers(each) for each in (first, second, third, fourth)]
    assert len({tuple(row) for row in drawn}) == 4
    # The n-th image of a seed is the same, whatever stands beside it.
    assert [numbers(each) for each in told_apart([generators(0)[0]] * 2)] == drawn[:2]
    *_, again = told_apart([generators(0)[0]] * 3)
    assert numbers(again) == drawn[3]
    # A generator that was used goes on with other images.
    assert numbers(told_apart([one] * 2)[1]) != drawn[1]


def test_a_clone_yields_the_same_and_leaves_the_other_alone():
    one = generators(0)[0]
    numbers(one)
    other = clone(one)
    assert numbers(other) == numbers(one)


def test_the_next_stage_depends_on_the_seed_of_its_image_alone():
    both = [numbers(each) for each in next_generators(generators(0, 1))]
    assert both[1] == numbers(next_generators(generators(1))[0]) != both[0]
    one = generators(0)[0]
    seeds = {each.initial_seed() for each in [*next_generators([one, one]), *next_generators([one])]}
    assert len(seeds) == 3 and 0 not in seeds
