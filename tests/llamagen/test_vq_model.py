import pytest
import torch
import torch.nn.functional as F
from tiny import build_vq_model

from llamagen_hf import LlamaGenVQModel
from llamagen_hf.evaluation.reconstruction import CodeCounts
from llamagen_hf.llamagen.vq_model import VectorQuantizer, entropy_loss


def test_codes_are_the_nearest_directions():
    quantizer = VectorQuantizer(num_vq_embeddings=16, vq_embed_dim=4, commit_weight=0.25, entropy_weight=0.0)
    latents = torch.randn(2, 4, 3, 5)
    output = quantizer(latents)
    cosine = torch.einsum("bchw,nc->bhwn", F.normalize(latents, dim=1), F.normalize(quantizer.embedding.weight, dim=1))
    assert torch.equal(output.codes, cosine.argmax(-1))
    torch.testing.assert_close(output.quantized.norm(dim=1), torch.ones(2, 3, 5))
    torch.testing.assert_close(quantizer.lookup(output.codes).permute(0, 3, 1, 2), output.quantized)


def test_gradients_pass_straight_through_to_the_encoder_and_by_the_loss_to_the_codebook():
    quantizer = VectorQuantizer(num_vq_embeddings=16, vq_embed_dim=4, commit_weight=0.25, entropy_weight=0.0)
    latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    output = quantizer(latents)
    weights = torch.randn(2, 4, 3, 3)
    (got,) = torch.autograd.grad((output.quantized * weights).sum(), latents, retain_graph=True)
    (expected,) = torch.autograd.grad((F.normalize(latents, dim=1) * weights).sum(), latents)
    torch.testing.assert_close(got, expected)

    assert torch.autograd.grad(output.vq_loss, latents, retain_graph=True, allow_unused=True)[0] is None
    (codebook_gradient,) = torch.autograd.grad(output.vq_loss, quantizer.embedding.weight, retain_graph=True)
    used = output.codes.flatten().unique()
    assert codebook_gradient[used].abs().sum() > 0
    unused = torch.tensor([i for i in range(16) if i not in used])
    assert codebook_gradient[unused].abs().sum() == 0
    assert torch.autograd.grad(output.commit_loss, latents)[0].abs().sum() > 0


def test_losses_and_usage_by_their_definitions():
    quantizer = VectorQuantizer(num_vq_embeddings=8, vq_embed_dim=4, commit_weight=0.5, entropy_weight=0.1)
    latents = torch.randn(1, 4, 2, 2)
    output = quantizer(latents)
    error = (F.normalize(latents, dim=1) - output.quantized).square().mean()
    torch.testing.assert_close(output.vq_loss, error)
    torch.testing.assert_close(output.commit_loss, 0.5 * error)
    counts = CodeCounts(8, output.codes.device)
    counts.add(output.codes)
    assert counts.usage == len(output.codes.unique()) / 8
    assert output.entropy_loss != 0


def test_entropy_loss_is_lowest_for_sure_and_even_codes():
    sure_and_even = torch.eye(8) * 10
    torch.testing.assert_close(entropy_loss(sure_and_even), torch.tensor(8.0).log().neg(), atol=1e-3, rtol=0)
    one_code = torch.zeros(8, 8).index_fill(1, torch.tensor([0]), 10.0)
    torch.testing.assert_close(entropy_loss(one_code), torch.tensor(0.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(entropy_loss(torch.zeros(8, 8)), torch.tensor(0.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("height, width", [(8, 8), (6, 10), (32, 2)])
def test_any_sides_that_the_downsampling_divides(height, width):
    model = build_vq_model()
    images = torch.rand(2, 3, height, width) * 2 - 1
    output = model(images)
    assert output.sample.shape == images.shape
    assert output.codes.shape == (2, height // 2, width // 2)
    torch.testing.assert_close(model.decode_codes(output.codes), output.sample)


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 7, 8), "Images are 7x8 pixels; both sides must be multiples of 2."),
        ((1, 4, 8, 8), r"expected \(batch, 3, height, width\)"),
        ((3, 8, 8), r"expected \(batch, 3, height, width\)"),
        ((0, 3, 8, 8), r"expected \(batch, 3, height, width\)"),
    ],
)
def test_images_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        build_vq_model().encode(torch.zeros(shape))


@pytest.mark.parametrize(
    "codes, message",
    [
        (torch.full((1, 2, 2), 64), "holds 64..64; expected 0..63"),
        (torch.full((1, 2, 2), -1), "holds -1..-1; expected 0..63"),
        (torch.zeros(1, 4, dtype=torch.long), r"expected \(batch, height, width\)"),
    ],
)
def test_codes_that_do_not_fit(codes, message):
    with pytest.raises(ValueError, match=message):
        build_vq_model().decode_codes(codes)


def test_batch_equals_single():
    model = build_vq_model()
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    together = model.encode(images).codes
    alone = torch.cat([model.encode(image[None]).codes for image in images])
    assert torch.equal(together, alone)


def test_saved_equals_loaded(tmp_path):
    model = build_vq_model()
    model.save_pretrained(tmp_path)
    loaded = LlamaGenVQModel.from_pretrained(tmp_path)
    assert loaded.config.num_vq_embeddings == 64 and tuple(loaded.config.block_out_channels) == (8, 16)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_compares_in_float32_at_any_dtype(dtype):
    quantizer = VectorQuantizer(num_vq_embeddings=512, vq_embed_dim=8, commit_weight=0.25, entropy_weight=0.0).to(
        dtype
    )
    latents = torch.randn(1, 8, 16, 16).to(dtype)
    output = quantizer(latents)
    assert output.quantized.dtype == dtype
    assert torch.equal(output.codes, quantizer.float()(latents.float()).codes)


def test_gradient_checkpointing_changes_no_gradient():
    model, images = build_vq_model().train(), torch.rand(2, 3, 8, 8) * 2 - 1
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(images).sample.square().mean().backward()
        gradients.append(model.encoder.conv_in.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert model.encoder.gradient_checkpointing


def test_outputs_are_tuples_too_in_the_order_of_diffusers():
    model, images = build_vq_model(), torch.rand(2, 3, 8, 8) * 2 - 1
    output = model(sample=images)
    assert output[0] is output.sample
    assert all(torch.equal(a, b) for a, b in zip(model(images, return_dict=False), output.to_tuple(), strict=True))
    encoded = model.encode(images)
    assert encoded[0] is encoded.codes and torch.equal(model.encode(images, return_dict=False)[0], encoded.codes)
    decoded = model.decode(encoded.quantized)
    assert torch.equal(decoded.sample, output.sample) and decoded[0] is decoded.sample
    (sample,) = model.decode(encoded.quantized, return_dict=False)
    assert torch.equal(sample, output.sample)
    assert torch.equal(model.lookup(encoded.codes), model.quantize.lookup(encoded.codes))


def test_decode_codes_is_exported():
    class Decoding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build_vq_model()

        def forward(self, codes):
            return self.model.decode_codes(codes)

    decoding, codes = Decoding(), torch.randint(64, (2, 4, 4))
    exported = torch.export.export(
        decoding, (codes,), dynamic_shapes=({0: torch.export.Dim("batch", max=63)},), strict=False
    )
    more = torch.randint(64, (3, 4, 4))
    torch.testing.assert_close(exported.module()(more), decoding(more))


def test_slices_are_the_whole():
    model, images = build_vq_model(), torch.rand(3, 3, 8, 8) * 2 - 1
    sizes = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        whole = model(images)
        model.enable_slicing()
        sliced = model(images)
        model.disable_slicing()
        model(images)
    assert sizes == [3, 3] + [1] * 6 + [3, 3]
    assert torch.equal(sliced.codes, whole.codes)
    torch.testing.assert_close(sliced.sample, whole.sample)


@pytest.mark.parametrize("height, width", [(32, 32), (8, 20), (18, 14)])
@pytest.mark.parametrize("tile", [8, 10])
def test_tiles_are_blended(height, width, tile):
    model, images = build_vq_model(), torch.rand(2, 3, height, width) * 2 - 1
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[2:]))
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(2 * torch.tensor(inputs[0].shape[2:])))
    with torch.no_grad():
        plain = model(images)
        seen.clear()
        model.enable_tiling()
        model.tile_sample_min_size = tile
        tiled = model(images)
        assert len(seen) > 2 and max(max(sides) for sides in seen) <= tile
        assert tiled.sample.shape == images.shape and tiled.codes.shape == (2, height // 2, width // 2)
        # What the first tile has for itself is what it is alone.
        alone = model.decode_codes(tiled.codes[:, : tile // 2, : tile // 2])
        kept = int(tile // 2 * 0.75) * 2
        torch.testing.assert_close(tiled.sample[:, :, :kept, :kept], alone[:, :, :kept, :kept])
        model.disable_tiling()
        assert torch.equal(model(images).sample, plain.sample)


def test_blended_tiles_of_a_plain_image_have_no_seams():
    model = build_vq_model()
    codes = torch.full((1, 12, 12), 5)
    model.enable_tiling()
    with torch.no_grad():
        model.decoder.forward = lambda latents: latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)
        pixels = model.decode_codes(codes)
    torch.testing.assert_close(pixels, pixels[:, :, :1, :1].expand_as(pixels))


def test_an_image_of_the_trained_size_is_one_tile():
    model, images = build_vq_model(), torch.rand(1, 3, 8, 8) * 2 - 1
    whole = model(images).sample
    model.enable_tiling()
    assert torch.equal(model(images).sample, whole)
