"""What the distributed models of all families share: embeddings, norm, head and soft prompts here, the blocks elsewhere.

They are mixed into transformers' own classes, which bring configurations, heads, losses and `generate`.

Legend: V vocabulary, L labels, E hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from transformers import GenerationConfig, PreTrainedModel

from corolla.errors import InvalidSetting, PromptError
from corolla.models.catalog import resolve
from corolla.models.checkpoint import Checkpoint, Progress
from corolla.models.families import architecture
from corolla.models.prompts import SoftPrompt, load_prompt, load_score, save_prompt
from corolla.models.quantized_files import stored_values
from corolla.models.span import DTYPES, check_head
from corolla.remote.calls import RemoteCalls
from corolla.remote.opening import open_blocks
from corolla.remote.prompts import SoftPrompts, TuningMode, soft_prompts
from corolla.remote.sequential import RemoteSequential
from corolla.remote.servers import RemoteConfig
from corolla.remote.session import InferenceSession
from corolla.types import Span

if TYPE_CHECKING:
    from corolla.remote.bare import DistributedModel


class Distributed(PreTrainedModel):
    """A model whose blocks are computed by servers, with a head or without.

    Its own weights are frozen; what is trained are soft prompts, where it has any, and a classifier's head. `close` it, or let it go.
    """

    supports_gradient_checkpointing = False  # nothing is computed here that could be checkpointed
    made_here: ClassVar[tuple[str, ...]] = ()  # weights that are trained, and drawn at random where a checkpoint lacks them
    _closing: Callable[[], object]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        initial_peers: Sequence[str] = (),
        secret: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        tuning_mode: TuningMode | None = None,
        pre_seq_len: int = 16,
        prompt: str | Path | None = None,
        num_labels: int | None = None,
        device: str | None = None,
        progress: Progress | None = None,
        **servers: Any,
    ) -> Any:
        """The model `name`, an alias, a directory or a hub id: of its tensors only the embeddings, norms and the head are read.

        Args:
            initial_peers: multiaddrs of a swarm; without any the blocks are computed in this process.
            secret: of the swarm.
            torch_dtype, dtype: either name; what is computed here, and in this process, in. By default what the checkpoint says.
            tuning_mode: "ptune" puts `pre_seq_len` soft tokens in front, "deep_ptune" at every block too.
            prompt: a directory that a soft prompt was saved to, by `save_pretrained` or by PEFT, to begin with.
            num_labels: of a classifier; by default what the checkpoint says.
            device: that blocks in this process are computed on, "cpu", "cuda" or "cuda:1"; the CPU by default.
            servers: `RemoteConfig`'s settings: allowed_servers, blocked_servers, request_timeout, max_retries...

        Raises:
            ModelNotFound, CheckpointError, UnsupportedModel, InvalidSetting, PromptError, NetworkError: as their sentences say.
        """
        settings = _settings(servers)
        directory = resolve(str(name), progress=progress)
        with Checkpoint(directory) as checkpoint:
            config = checkpoint.config
            assert cls.config_class is not None, "a family names its configuration"
            family = cls.config_class.model_type
            if config.model_type != family:
                raise InvalidSetting("model", f"{name} is a {config.model_type} model, and {cls.__name__} is for {family}")
            blocks, computed_in = architecture(config).blocks, _dtype(dtype or torch_dtype, config)
            if num_labels is not None:
                config.num_labels = num_labels
            with torch.device("meta"):
                model = cls(config)
            model._load(checkpoint, computed_in)
        if model.can_generate() and (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in cls.made_here)
        model.name_or_path = config.name_or_path = str(name)
        if prompt is not None:
            model.load_prompt(prompt)
        elif tuning_mode is not None:
            model.bare.prompts = soft_prompts(tuning_mode, pre_seq_len, cast(torch.Tensor, model.get_input_embeddings().weight), blocks)
        opened = open_blocks(
            directory,
            blocks,
            computed_in,
            initial_peers=initial_peers,
            secret=None if secret is None else secret.encode(),
            device=device,
            config=settings,
        )
        model.connect(opened.calls)
        model._closing = weakref.finalize(model, opened.close)
        return model.eval()

    @property
    def bare(self) -> DistributedModel:
        """The model without its head."""
        bare: DistributedModel = self.base_model  # type: ignore[assignment]  # the family's prefix says which it is
        return bare

    def connect(self, calls: RemoteCalls) -> None:
        """Compute the blocks through `calls` from now on."""
        setattr(self.bare, self.bare._names.blocks, RemoteSequential(calls, Span(0, architecture(self.config).blocks)))

    def close(self) -> None:
        """Leave the swarm, or free what this process keeps of the blocks. Closing twice is no error."""
        self._closing()

    def inference_session(self, *, max_length: int | None = None) -> InferenceSession:
        """A session of this model and its soft prompts, for `generate(..., session=...)`; a context manager.

        Args:
            max_length: columns that it may come to, soft tokens not counted; the model's context by default.
        """
        prompts, context = self.bare.prompts, architecture(self.config).context_length
        prefix = 0 if prompts is None else len(prompts)
        deep = None if prompts is None or prompts.deep is None else prompts.deep.detach()
        most = context if max_length is None else min(context, max_length + prefix)
        blocks = self.bare.blocks
        return InferenceSession(blocks.calls, blocks.span, max_length=most, prompts=deep, prefix=prefix)

    @property
    def soft_prompt(self) -> SoftPrompt:
        """A copy of the soft prompt as it is now. Raises `PromptError` where there is none, or it is not finite."""
        if self.bare.prompts is None:
            raise PromptError("the model has no soft prompt: load it with tuning_mode='ptune', 'deep_ptune' or with prompt=DIRECTORY")
        return self.bare.prompts.as_they_are()

    def load_prompt(self, directory: str | Path) -> None:
        """Take the soft prompt of `directory`, of ours or PEFT's, in the place of the one there is; a classifier's head with it.

        Raises `PromptError` for files that are missing or damaged, and for a prompt of another model.
        """
        arch, weight = architecture(self.config), cast(torch.Tensor, self.get_input_embeddings().weight)
        self.bare.prompts = SoftPrompts.of(load_prompt(Path(directory), arch)).to(weight.device)
        score = load_score(Path(directory), arch)
        if score is not None and self.made_here:
            head = cast(torch.nn.Linear, self.score)
            if score.shape != head.weight.shape:
                raise PromptError(f"{directory}: its classifier has {len(score)} labels, and this one {len(head.weight)}: set num_labels")
            with torch.no_grad():
                head.weight.copy_(score)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:  # type: ignore[override]
        """Save what is trained, the soft prompt and a classifier's head, as PEFT does, deep prompts beside it; see `models.prompts`.

        Raises `PromptError` where there is none, or it is not finite; `StorageError`.
        """
        score = cast(torch.nn.Linear, self.score).weight if self.made_here else None
        save_prompt(Path(save_directory), self.soft_prompt, architecture(self.config), base_model=self.name_or_path or "", score=score)

    def _load(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        """Read what is on the meta device. A checkpoint's names may have the base model's prefix or not, whether ours do or not."""
        prefix = f"{self.base_model_prefix}."
        tensors = {}
        arch = architecture(self.config)
        if self.can_generate():
            for root in arch.names.prefixes:
                check_head(checkpoint, arch, f"{root}{arch.names.embedding}.weight")
        for name, parameter in self.named_parameters():
            spellings = [name, name.removeprefix(prefix), prefix + name]
            if name == "lm_head.weight":  # transformers' name for every family's
                spellings.append(f"{arch.names.head}.weight")
            stored = next((spelling for spelling in spellings if checkpoint.has(spelling)), name)
            if name in self.made_here and not checkpoint.has(stored):
                tensors[name] = torch.empty(parameter.shape, dtype=dtype).normal_(std=self.config.initializer_range)
            else:
                tensors[name] = stored_values(checkpoint, stored, tuple(parameter.shape), dtype)
        self.load_state_dict(tensors, strict=False, assign=True)  # what is tied to another tensor is not among them
        self.tie_weights()


def _settings(given: dict[str, Any]) -> RemoteConfig:
    names = [field.name for field in fields(RemoteConfig)]
    for name, value in given.items():
        if name not in names:
            raise InvalidSetting(name, f"there is no such setting; there are {', '.join(names)}")
        if name in ("allowed_servers", "blocked_servers") and not isinstance(value, str) and isinstance(value, Iterable):
            given[name] = frozenset(value)
    return RemoteConfig(**{name: value for name, value in given.items() if value is not None})


def _dtype(given: torch.dtype | str | None, config: Any) -> torch.dtype:
    if given is None or given == "auto":
        given = getattr(config, "dtype", None) or torch.float32
    dtype = DTYPES.get(given) if isinstance(given, str) else given
    if dtype is None or dtype not in DTYPES.values():
        raise InvalidSetting("torch_dtype", f"{given} is none of {', '.join(DTYPES)}")
    return dtype


_made: dict[tuple[type, type], Any] = {}


def distributed(ours: type, stock: type) -> Any:
    """transformers' class `stock` of a family with its blocks elsewhere, as `ours` has them: one class, however often it is asked for."""
    if (ours, stock) not in _made:
        about = {"__doc__": f"transformers' {stock.__name__} with its blocks elsewhere.", "__module__": "corolla.remote.models"}
        own: dict[str, Any] = {**about, "config_class": stock.config_class}  # type: ignore[attr-defined]
        _made[ours, stock] = type(f"Distributed{stock.__name__}", (ours, stock), own)
    return _made[ours, stock]
