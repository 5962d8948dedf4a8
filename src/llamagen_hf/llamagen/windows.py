"""Several codes a step, and the same image: the codes as a fixed point, solved by Jacobi iteration.

A code is a function of the codes before it and of its own noise. So a step may draw a whole window of codes from
guesses of the codes before them. Those whose guesses turn out to be right are final, and the others are the next
guesses. The noise does not change, so no guess changes what an image finally is. Wiggers and Hoogeboom (2020, arXiv
2002.09928) draw from autoregressive models so, with Gumbel noise as here; Song et al. (2021, arXiv 2002.03629) give
the iteration without noise.
"""

import torch


class CodeWindows:
    """The codes of images that are being drawn, and for each image the window that the next step reads.

    Args:
        codes (`torch.LongTensor` of shape `(batch, num_codes)`): The final codes, and room for the others.
        num_final (`int`): How many codes are final, at least one.
        width (`int`): Codes that a step reads of an image, at least 1 and less than `num_codes`.
        grid_size (`int`): Codes in a row of an image.

    Attributes:
        num_final (`torch.LongTensor` of shape `(batch,)`): How many codes of each image are final.
    """

    def __init__(self, codes: torch.LongTensor, num_final: int, width: int, grid_size: int):
        self.codes, self.width, self.grid_size = codes, width, grid_size
        self.num_final = torch.full((len(codes),), num_final, device=codes.device)
        self.num_codes = codes.shape[1]
        self._num_guessed = self.num_final.clone()  # each image has codes or guesses up to here
        self._places = torch.arange(width, device=codes.device)

    @property
    def inputs(self) -> torch.LongTensor:
        """Indices `(batch, width)` of the codes that the next step reads. It draws the codes after each of them."""
        first = (self.num_final - 1).clamp(max=self.num_codes - 1 - self.width)
        return first[:, None] + self._places

    def guess(self) -> torch.LongTensor:
        """Codes `(batch, width)` that the next step reads. New guesses repeat the code above, or in the first row the
        code to the left."""
        inputs = self.inputs
        end = int(inputs[:, -1].max()) + 1
        self._num_guessed = torch.maximum(self._num_guessed, self.num_final)
        for index in range(int(self._num_guessed.min()), end):
            near = index - self.grid_size if index >= self.grid_size else index - 1
            column = torch.where(index < self._num_guessed, self.codes[:, index], self.codes[:, near])
            self.codes[:, index] = column
        self._num_guessed.clamp_(min=end)
        return self.codes.gather(1, inputs)

    def update(self, drawn: torch.LongTensor) -> None:
        """Take over what a step has drawn.

        Args:
            drawn (`torch.LongTensor` of shape `(batch, width)`): The codes after each input.
        """
        inputs = self.inputs
        read, outputs = self.codes.gather(1, inputs), inputs + 1
        is_right = inputs < self.num_final[:, None]
        is_right[:, 1:] |= drawn[:, :-1] == read[:, 1:]
        count = is_right.long().cumprod(1).sum(1)
        kept = self.codes.gather(1, outputs)
        self.codes.scatter_(1, outputs, torch.where(outputs < self.num_final[:, None], kept, drawn))
        self._num_guessed = torch.maximum(self._num_guessed, outputs[:, -1] + 1)
        self.num_final = torch.maximum(self.num_final, inputs[:, 0] + 1 + count)

    def roll_back(self, num_final: int) -> None:
        """Make guesses again of all codes from index `num_final` on, since one before them has changed."""
        self.num_final.clamp_(max=num_final)
