"""A recorded quality as the user reads it."""

from collections.abc import Sequence

from phiquant.gguf.quality import Quality

__all__ = ["quality_rows", "quality_sentence"]


def quality_sentence(quality: Quality) -> str:
    """The figures in a line."""
    return (
        f"KL divergence {quality.kl_mean:.6f} (99.9 % below {quality.kl_p999:.4f}), "
        f"same top token {100 * quality.top1:.2f} %, perplexity {quality.perplexity:.4f} beside "
        f"{quality.reference_perplexity:.4f}, over {quality.tokens:,} tokens"
    )


def quality_rows(quality: Quality) -> Sequence[tuple[str, str]]:
    """The figures as rows of a table: what, and how much."""
    before = f", after {quality.first_window:,} windows that were left out" if quality.first_window else ""
    return (
        ("mean KL divergence", f"{quality.kl_mean:.6f} nats per token"),
        ("99.9 % of positions below", f"{quality.kl_p999:.6f}"),
        ("same top token", f"{100 * quality.top1:.2f} %"),
        ("perplexity", f"{quality.perplexity:.4f}, of the reference {quality.reference_perplexity:.4f}"),
        ("reference", quality.reference),
        ("measured on", f"{quality.tokens:,} tokens in windows of {quality.context:,}{before}"),
        ("text (SHA-256)", quality.text_sha256),
        ("method", quality.method),
    )
