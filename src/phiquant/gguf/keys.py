"""The metadata keys that phiquant reads and writes, by the names that llama.cpp gives them.

Keys of an architecture are prefixed by its name: `ArchitectureKeys("phi3").block_count` is "phi3.block_count". Keys
that start with "phiquant." are this project's own; other readers pass over them.
"""

from typing import Final

# general: what the file is
ARCHITECTURE: Final = "general.architecture"
TYPE: Final = "general.type"
ALIGNMENT: Final = "general.alignment"
FILE_TYPE: Final = "general.file_type"
QUANTIZATION_VERSION: Final = "general.quantization_version"

# general: sampling defaults, from generation_config.json
SAMPLING_SEQUENCE: Final = "general.sampling.sequence"
SAMPLING_TOP_K: Final = "general.sampling.top_k"
SAMPLING_TOP_P: Final = "general.sampling.top_p"
SAMPLING_MIN_P: Final = "general.sampling.min_p"
SAMPLING_XTC_PROBABILITY: Final = "general.sampling.xtc_probability"
SAMPLING_XTC_THRESHOLD: Final = "general.sampling.xtc_threshold"
SAMPLING_TEMPERATURE: Final = "general.sampling.temp"
SAMPLING_PENALTY_LAST_N: Final = "general.sampling.penalty_last_n"
SAMPLING_PENALTY_REPEAT: Final = "general.sampling.penalty_repeat"
SAMPLING_MIROSTAT: Final = "general.sampling.mirostat"
SAMPLING_MIROSTAT_TAU: Final = "general.sampling.mirostat_tau"
SAMPLING_MIROSTAT_ETA: Final = "general.sampling.mirostat_eta"

# general: where the model comes from
NAME: Final = "general.name"
AUTHOR: Final = "general.author"
VERSION: Final = "general.version"
ORGANIZATION: Final = "general.organization"
FINETUNE: Final = "general.finetune"
BASENAME: Final = "general.basename"
DESCRIPTION: Final = "general.description"
QUANTIZED_BY: Final = "general.quantized_by"
SIZE_LABEL: Final = "general.size_label"
LICENSE: Final = "general.license"
LICENSE_NAME: Final = "general.license.name"
LICENSE_LINK: Final = "general.license.link"
URL: Final = "general.url"
DOI: Final = "general.doi"
UUID: Final = "general.uuid"
REPO_URL: Final = "general.repo_url"
SOURCE_URL: Final = "general.source.url"
SOURCE_DOI: Final = "general.source.doi"
SOURCE_UUID: Final = "general.source.uuid"
SOURCE_REPO_URL: Final = "general.source.repo_url"
BASE_MODEL_COUNT: Final = "general.base_model.count"
DATASET_COUNT: Final = "general.dataset.count"
TAGS: Final = "general.tags"
LANGUAGES: Final = "general.languages"

# split: parts of a model in several files
SPLIT_NO: Final = "split.no"
SPLIT_COUNT: Final = "split.count"
SPLIT_TENSORS_COUNT: Final = "split.tensors.count"

# importance matrices: of a file that holds one, and of a model that was quantized with one
IMATRIX_DATASETS: Final = "imatrix.datasets"
IMATRIX_CHUNK_COUNT: Final = "imatrix.chunk_count"
IMATRIX_CHUNK_SIZE: Final = "imatrix.chunk_size"
QUANTIZE_IMATRIX_FILE: Final = "quantize.imatrix.file"
QUANTIZE_IMATRIX_DATASET: Final = "quantize.imatrix.dataset"
QUANTIZE_IMATRIX_ENTRIES: Final = "quantize.imatrix.entries_count"
QUANTIZE_IMATRIX_CHUNKS: Final = "quantize.imatrix.chunks_count"

# of a model that was quantized by what it computes on a text: how, how many tokens, which
QUANTIZE_METHOD: Final = "phiquant.quantize.method"
QUANTIZE_TOKENS: Final = "phiquant.quantize.tokens"
QUANTIZE_DATASET: Final = "phiquant.quantize.dataset"
QUANTIZE_DATASET_HASH: Final = "phiquant.quantize.dataset_hash"
QUANTIZE_SEARCH: Final = "phiquant.quantize.search"
QUANTIZE_STATISTICS: Final = "phiquant.quantize.statistics"
DISTILL_EPOCHS: Final = "phiquant.quantize.distilled.epochs"
DISTILL_TOKENS: Final = "phiquant.quantize.distilled.tokens"
DISTILL_KL_BEFORE: Final = "phiquant.quantize.distilled.kl_before"
DISTILL_KL_AFTER: Final = "phiquant.quantize.distilled.kl_after"

# files of statistics: of which model, which of its weights share an entry, and the text
STATISTICS_MODEL: Final = "phiquant.statistics.model"
STATISTICS_WEIGHTS: Final = "phiquant.statistics.weights"
STATISTICS_TOKENS: Final = "phiquant.statistics.tokens"
STATISTICS_CONTEXT: Final = "phiquant.statistics.context"
STATISTICS_DATASET: Final = "phiquant.statistics.dataset"
STATISTICS_DATASET_HASH: Final = "phiquant.statistics.dataset_hash"

# tokenizer
TOKENIZER_MODEL: Final = "tokenizer.ggml.model"
TOKENIZER_PRE: Final = "tokenizer.ggml.pre"
TOKENS: Final = "tokenizer.ggml.tokens"
SCORES: Final = "tokenizer.ggml.scores"
TOKEN_TYPE: Final = "tokenizer.ggml.token_type"
MERGES: Final = "tokenizer.ggml.merges"
BOS_ID: Final = "tokenizer.ggml.bos_token_id"
EOS_ID: Final = "tokenizer.ggml.eos_token_id"
EOT_ID: Final = "tokenizer.ggml.eot_token_id"
EOM_ID: Final = "tokenizer.ggml.eom_token_id"
UNKNOWN_ID: Final = "tokenizer.ggml.unknown_token_id"
SEPARATOR_ID: Final = "tokenizer.ggml.seperator_token_id"  # spelled so in every file
PADDING_ID: Final = "tokenizer.ggml.padding_token_id"
CLS_ID: Final = "tokenizer.ggml.cls_token_id"
MASK_ID: Final = "tokenizer.ggml.mask_token_id"
FIM_PREFIX_ID: Final = "tokenizer.ggml.fim_pre_token_id"
FIM_SUFFIX_ID: Final = "tokenizer.ggml.fim_suf_token_id"
FIM_MIDDLE_ID: Final = "tokenizer.ggml.fim_mid_token_id"
PREFIX_ID: Final = "tokenizer.ggml.prefix_token_id"
SUFFIX_ID: Final = "tokenizer.ggml.suffix_token_id"
MIDDLE_ID: Final = "tokenizer.ggml.middle_token_id"
ADD_BOS: Final = "tokenizer.ggml.add_bos_token"
ADD_EOS: Final = "tokenizer.ggml.add_eos_token"
ADD_SPACE_PREFIX: Final = "tokenizer.ggml.add_space_prefix"
REMOVE_EXTRA_WHITESPACES: Final = "tokenizer.ggml.remove_extra_whitespaces"
CHAT_TEMPLATE: Final = "tokenizer.chat_template"
CHAT_TEMPLATES: Final = "tokenizer.chat_templates"

# phiquant's own
# A string: JSON, the `added_tokens` list of the checkpoint's tokenizer.json, whose lstrip, rstrip, normalized and
# single_word GGUF has no place for.
ADDED_TOKENS: Final = "phiquant.tokenizer.added_tokens"
# An array of uint32: every id with which the checkpoint's generation_config.json ends a reply; GGUF has keys for three.
END_IDS: Final = "phiquant.tokenizer.eos_token_ids"
# True where the checkpoint's byte-level vocabulary gives a word that is a token that token, whatever the merges say.
IGNORE_MERGES: Final = "phiquant.tokenizer.ignore_merges"

# How PhiMoE computes, where llama.cpp computes otherwise and its files say nothing; it passes over these keys.
# Strings: "layer" for norms that subtract the mean, "sparsemixer" for the routing of `kernels.ops.Route`.
NORM: Final = "phiquant.norm"
ROUTER: Final = "phiquant.router"
# A float32: experts whose score is within twice this much of the best one's, relatively, share its weight.
ROUTER_JITTER: Final = "phiquant.router.jitter"
# Float32: what multiplies cosine and sine under LongRoPE's short and its long factors (short_mscale, long_mscale).
ROPE_ATTENTION_FACTOR_SHORT: Final = "phiquant.rope.attention_factor_short"
ROPE_ATTENTION_FACTOR_LONG: Final = "phiquant.rope.attention_factor_long"

# A string and an array of uint64, one for each tensor: `gguf.checksum` says of what.
CHECKSUM: Final = "phiquant.checksum"
TENSOR_CHECKSUMS: Final = "phiquant.checksum.tensors"

# What the file's own quality is; `gguf.quality` says which keys begin so, and of what weights the figures are.
QUALITY: Final = "phiquant.quality."
QUALITY_WEIGHTS: Final = "phiquant.quality.weights"

# Of mixes made for a size: the size as it was asked for and the name of a text, strings; the divergence from the source
# on that text in nats for each token, float32.
MIX_BUDGET: Final = "phiquant.mix.budget"
MIX_TEXT: Final = "phiquant.mix.text"
MIX_PREDICTED: Final = "phiquant.mix.predicted_divergence"
MIX_MEASURED: Final = "phiquant.mix.measured_divergence"


class ArchitectureKeys:
    """The keys that carry an architecture's hyperparameters, each an attribute of its name."""

    def __init__(self, architecture: str) -> None:
        a = architecture
        self.vocab_size: Final = f"{a}.vocab_size"
        self.context_length: Final = f"{a}.context_length"
        self.embedding_length: Final = f"{a}.embedding_length"
        self.feed_forward_length: Final = f"{a}.feed_forward_length"
        self.block_count: Final = f"{a}.block_count"
        self.expert_count: Final = f"{a}.expert_count"
        self.expert_used_count: Final = f"{a}.expert_used_count"
        self.head_count: Final = f"{a}.attention.head_count"
        self.head_count_kv: Final = f"{a}.attention.head_count_kv"
        self.key_length: Final = f"{a}.attention.key_length"
        self.value_length: Final = f"{a}.attention.value_length"
        self.layer_norm_epsilon: Final = f"{a}.attention.layer_norm_epsilon"
        self.layer_norm_rms_epsilon: Final = f"{a}.attention.layer_norm_rms_epsilon"
        self.sliding_window: Final = f"{a}.attention.sliding_window"
        self.attention_scale: Final = f"{a}.attention.scale"
        self.embedding_scale: Final = f"{a}.embedding_scale"
        self.logit_scale: Final = f"{a}.logit_scale"
        self.rope_dimension_count: Final = f"{a}.rope.dimension_count"
        self.rope_freq_base: Final = f"{a}.rope.freq_base"
        self.rope_scaling_type: Final = f"{a}.rope.scaling.type"
        self.rope_scaling_factor: Final = f"{a}.rope.scaling.factor"
        self.rope_scaling_attn_factor: Final = f"{a}.rope.scaling.attn_factor"
        self.rope_scaling_original_context_length: Final = f"{a}.rope.scaling.original_context_length"


def base_model(index: int, what: str) -> str:
    """The key of one of the models this one was made from; `what` is name, author, version, organization, repo_url …"""
    return f"general.base_model.{index}.{what}"


def dataset(index: int, what: str) -> str:
    """The key of one of the data sets this model was trained on; `what` as for `base_model`."""
    return f"general.dataset.{index}.{what}"


def chat_template(name: str) -> str:
    """The key of a further chat template; `CHAT_TEMPLATES` lists their names."""
    return f"tokenizer.chat_template.{name}"


class Phi3SmallKeys:
    """The keys of Phi-3-small alone: what a query sees in its sparse layers, and the limit of its gate."""

    def __init__(self, architecture: str) -> None:
        a = architecture
        self.block_size: Final = f"{a}.attention.block_sparse.block_size"
        self.local_blocks: Final = f"{a}.attention.block_sparse.local_blocks"
        self.vertical_stride: Final = f"{a}.attention.block_sparse.vertical_stride"
        self.layers: Final = f"{a}.attention.block_sparse.layers"
        self.gate_limit: Final = f"{a}.feed_forward.gate_limit"
