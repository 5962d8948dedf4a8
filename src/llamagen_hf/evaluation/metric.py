"""How metrics are called and written: in reports, plots and cards."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """What a reader has to know about a metric.

    Args:
        label (`str`): Its usual name.
        spec (`str`): How its values are written, as by `format`.
        better (`str`, *optional*): `"lower"` or `"higher"`.
        about (`str`, *optional*): What it measures, in one sentence.
        arxiv (`str`, *optional*): The paper that defines it.
        scale (`float`, *optional*, defaults to 1): What values are multiplied with when written.
    """

    label: str
    spec: str = ".4g"
    better: str | None = None
    about: str = ""
    arxiv: str | None = None
    scale: float = 1

    @property
    def arrow(self) -> str:
        """Where better values lie: `"↓"`, `"↑"` or nothing."""
        return {"lower": "↓", "higher": "↑", None: ""}[self.better]

    @property
    def title(self) -> str:
        """The label with its arrow."""
        return f"{self.label} {self.arrow}".strip()

    def write(self, value: float) -> str:
        """A value, or a standard deviation, as readers expect it."""
        return format(value * self.scale, self.spec)


METRICS = {
    "fid": Metric("FID", ".2f", "lower", "Distance of the Inception features of samples and reference.", "1706.08500"),
    "sfid": Metric("sFID", ".2f", "lower", "FID of features that keep where things are.", "2103.03841"),
    "inception_score": Metric(
        "Inception Score", ".1f", "higher", "How surely a classifier names each sample, and how many names it gives.",
        "1606.03498",
    ),
    "precision": Metric(
        "Precision", ".3f", "higher", "Share of the samples that lie among the reference.", "1904.06991"
    ),
    "recall": Metric("Recall", ".3f", "higher", "Share of the reference that lies among the samples.", "1904.06991"),
    "kid": Metric(
        "KID × 10³", ".2f", "lower", "Squared maximum mean discrepancy of Inception features, without FID's bias.",
        "1801.01401", 1000,
    ),
    "clip_score": Metric(
        "CLIP score", ".2f", "higher", "Cosine of a prompt's and its image's CLIP embeddings, times 100.",
        "2104.08718",
    ),
    "r_precision": Metric(
        "R-precision", ".1%", "higher", "Share of the images whose own prompt CLIP finds among others.", "1711.10485"
    ),
    "rfid": Metric(
        "rFID", ".2f", "lower", "FID of images that were encoded and decoded, against themselves.", "1706.08500"
    ),
    "psnr": Metric("PSNR (dB)", ".2f", "higher", "Peak signal-to-noise ratio of images encoded and decoded."),
    "ssim": Metric("SSIM", ".3f", "higher", "Structural similarity of images encoded and decoded."),
    "lpips": Metric(
        "LPIPS", ".3f", "lower", "Perceptual distance of images encoded and decoded from what they were.",
        "1801.03924",
    ),
    "codebook_usage": Metric("Codes in use", ".1%", "higher", "Share of the codebook that the images use."),
    "codebook_perplexity": Metric(
        "Code perplexity", ",.0f", "higher", "How many codes, used equally often, would be as varied."
    ),
}  # fmt: skip


def metric(name: str) -> Metric:
    """What is known about a metric; of one that is not known here, its name alone."""
    return METRICS.get(name) or Metric(name.replace("_", " "))
