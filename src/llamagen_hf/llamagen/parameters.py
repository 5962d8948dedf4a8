"""The parameters that made an image: enough to draw it again, as plain JSON."""

from importlib.metadata import version

import torch

from ..arguments import is_integer, plain
from .inputs import SAMPLING_SETTINGS, GenerationInputs
from .pipeline_output import AutoregressiveImageOutput


# Left out of the parameters where a drawing does not need them.
DEFAULTS = {"seed_index": 0, "batch_size": 1, "batch_index": 0, "generator_device": "cpu", "prefix_codes": []}


class RedrawMixin:
    """What the parameters of images say about a pipeline, and the way back from them."""

    @property
    def facts(self) -> dict:
        """What the parameters of all images say about the pipeline: checkpoint, device, dtype, versions."""
        facts = self._origin | {"device": self._execution_device.type, "dtype": str(self.transformer.dtype)[6:]}
        if self.loras:
            facts["lora"] = self.loras
        if self.decoder.is_compiled:
            facts["compiled"] = True
        return facts | {"llamagen_hf": version("llamagen-hf"), "torch": torch.__version__}

    def redraw(self, parameters: dict, output_type: str = "pil") -> AutoregressiveImageOutput:
        """Draw an image again from the parameters that made it.

        With the same checkpoint, device, dtype and library versions it is the same to the last bit.

        Args:
            parameters (`dict`): One of an output's `parameters`, or what
                [`~llamagen_hf.provenance.read_parameters`] reads.
            output_type (`str`, *optional*, defaults to `"pil"`): As for [`AutoregressiveImagePipeline.__call__`].

        Raises:
            ValueError: In one sentence, if they do not determine an image, or do not fit the checkpoint.
        """
        config, loras = self.require("transformer", "which draws").config, parameters.get("lora", [])
        if loras != self.loras:
            raise ValueError(f"The image was drawn with the adapters {loras}, the pipeline has {self.loras}.")
        inputs, index = redrawing_inputs(parameters, config.num_codes, self._execution_device)
        output = self(**inputs, output_type=output_type)
        one = slice(index, index + 1)
        return AutoregressiveImageOutput(output.images[one], output.codes[one], [parameters])


def fresh_seed(generator: torch.Generator) -> int | None:
    """The seed of a generator that nothing was drawn from yet, else `None`."""
    seed = generator.initial_seed()
    fresh = torch.Generator(generator.device).manual_seed(seed)
    return seed if torch.equal(generator.get_state(), fresh.get_state()) else None


def describe(
    inputs: GenerationInputs,
    settings: dict[str, float],
    generators: list[torch.Generator],
    prefix_codes: torch.LongTensor | None,
    facts: dict[str, str],
) -> list[dict]:
    """The parameters of each image of a drawing, candidates included.

    Args:
        inputs ([`GenerationInputs`]): What was asked for.
        settings (`dict[str, float]`): Sampling settings, none of them `None`.
        generators (`list[torch.Generator]`): For each image the generator that it will draw from. One that stands
            here several times serves these images one after the other.
        prefix_codes (`torch.LongTensor` of shape `(batch, n)`, *optional*): The codes that are kept.
        facts (`dict[str, str]`): What is the same for all: checkpoint, device, dtype, versions.

    Returns:
        `list[dict]`: The prompt or class as `prompt` or `class_labels`; the settings; `seed`, `None` where a generator
        was used before; `seed_index`, how many images of this call its generator drew before; `generator_device`;
        `batch_size` and `batch_index`, for an image's last bits may depend on them; `prefix_codes`; and the facts.
    """
    name = "prompt" if inputs.prompt is not None else "class_labels"
    seeds = {id(generator): fresh_seed(generator) for generator in generators}
    uses: dict[int, int] = {}
    described = []
    for index, generator in enumerate(generators):
        condition = inputs.conditions[index // (len(generators) // len(inputs.conditions))]
        parameters = {name: condition} if inputs.prompt_embeds is None else {}
        optional = {
            "seed_index": uses.get(id(generator), 0),
            "batch_size": len(generators),
            "batch_index": index,
            "generator_device": generator.device.type,
            "prefix_codes": [] if prefix_codes is None else prefix_codes[index].tolist(),
        }
        uses[id(generator)] = optional["seed_index"] + 1
        parameters |= settings | {"seed": seeds[id(generator)]}
        parameters |= {name: value for name, value in optional.items() if value != DEFAULTS[name]}
        described.append(parameters | facts)
    return described


def redrawing_inputs(parameters: dict, num_codes: int, device: torch.device) -> tuple[dict, int]:
    """What the pipeline draws an image again from, and the image's place in that batch.

    The whole batch is drawn, each image of it being the one that is wanted, for its size can change the last bits.

    Args:
        parameters (`dict`): As [`describe`] gives them.
        num_codes (`int`): Codes of an image.
        device (`torch.device`): Where the prefix goes.

    Raises:
        ValueError: In one sentence, if they do not determine an image.
    """
    condition = {name: parameters[name] for name in ("prompt", "class_labels") if name in parameters}
    if len(condition) != 1:
        raise ValueError("These parameters hold neither a prompt nor a class, so the image can't be drawn again.")
    if parameters.get("seed") is None:
        raise ValueError(
            "These parameters hold no seed, so the image can't be drawn again; draw with a generator that is new."
        )
    if missing := [name for name in SAMPLING_SETTINGS if name not in parameters]:
        raise ValueError(f"These parameters lack {', '.join(missing)}, so the image can't be drawn again.")
    if "interrupted_after" in parameters:
        raise ValueError("The image was interrupted; these parameters would draw the whole of it.")
    full = {name: plain(value) for name, value in (DEFAULTS | parameters).items()}
    for name, limit in (("seed", 2**64), ("seed_index", 2**16), ("batch_size", 2**12), ("batch_index", None)):
        limit = full["batch_size"] if limit is None else limit
        if not is_integer(full[name]) or not 0 <= full[name] < limit:
            raise ValueError(f"These parameters are damaged: {name} is {full[name]!r}.")
    codes = full["prefix_codes"]
    if not isinstance(codes, list) or not all(isinstance(code, int) for code in codes):
        raise ValueError("These parameters are damaged: prefix_codes is no list of codes.")
    generators = []
    for _ in range(full["batch_size"]):
        try:
            generator = torch.Generator(full["generator_device"]).manual_seed(full["seed"])
        except RuntimeError as error:
            raise ValueError(f"There is no device {full['generator_device']!r} here to draw the seed on.") from error
        for _ in range(full["seed_index"]):
            torch.rand(num_codes, dtype=torch.float32, generator=generator, device=generator.device)
        generators.append(generator)
    inputs = condition | {name: parameters[name] for name in SAMPLING_SETTINGS}
    inputs |= {"num_images_per_prompt": full["batch_size"], "generator": generators}
    if codes:
        inputs["prefix_codes"] = torch.tensor([codes], device=device)
    return inputs, full["batch_index"]
