import torch

from llamagen_hf.llamagen.noise import _STEP, _mix, gumbel_noise


def test_the_generator_is_splitmix64():
    # Figures of the published algorithm for the seed 1234567.
    states = 1234567 + torch.arange(1, 4) * _STEP
    assert _mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423 - 2**64]


def test_noise_has_the_moments_of_the_gumbel_distribution():
    noise = gumbel_noise(torch.arange(100), torch.arange(100), 4096).double()
    torch.testing.assert_close(noise.mean().item(), 0.5772, atol=0.008, rtol=0)
    torch.testing.assert_close(noise.var().item(), 1.6449, atol=0.02, rtol=0)
    assert noise.isfinite().all()


def test_noise_of_a_code_does_not_depend_on_what_is_computed_beside_it():
    keys, indices = torch.tensor([3, 2**61, 9]), torch.tensor([0, 255, 7])
    together = gumbel_noise(keys, indices, 1000)
    for row in range(3):
        assert torch.equal(gumbel_noise(keys[row : row + 1], int(indices[row]), 1000)[0], together[row])
    assert torch.equal(gumbel_noise(keys, indices, 64), together[:, :64])


def test_images_codes_and_tokens_have_noise_of_their_own():
    noise = torch.stack(
        [gumbel_noise(torch.tensor([key]), index, 4096)[0] for key in (0, 1, 2**40) for index in (0, 1, 300)]
    )
    correlations = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlations.abs().max() < 0.06
    shifted = torch.corrcoef(torch.stack([noise[0, :-1], noise[0, 1:]]))[0, 1]
    assert shifted.abs() < 0.05
