"""The method: a frozen Qwen2.5-VL, the five modules of latent-action control, and rollouts.

Paper: "Controlling Multimodal Conversational Agents with Coverage-Enhanced Latent Actions"
(arXiv 2601.07516), section 3. Top to bottom:

    modules     CausalStack (inverse dynamics, policy), WorldModel, Projector with its GaussianMap;
                the codebook is an nn.Embedding (Agent.make); then what losses share
    Agent       the backbone and these modules: `states`, `next_token_logits`, loading, `chat`
    rollouts    `rollout` of a group of answers; `replay` of them from the states it kept
    data        dialogue rows -> token tensors with explicit 3-D positions; resumable streams
    runtime     ranks, flags, predecessors, run folders, exact checkpoints, errors for people

    image x^V, text x^T_1..x^T_t
              |
    frozen backbone ---------------- e_t in R^d: last hidden state at x^T_t after the final norm
              |
    s_t = e^{V,T}_t with an image, mu_P(e^T_t) without one               projector P, P'
              |
              +---> policy pi(a_t | s_1..s_t) ---> a_t in 0..|C|-1      decoder layers, |C|-way head
              |                                     |
              |                              c_t = C[a_t] in R^d         codebook
              v                                     v
    world model f_world(s_t, a_t): merge of s_t and c_t, the frozen lm_head ---> x_{t+1}

    in training only: inverse dynamics infers a_t from s_1..s_{t+1}, having seen x_{t+1}. It makes
    the codes (train_idm.py), the policy clones them (train_bc.py), RL trains the policy alone.

States do not depend on the policy's weights. So a rollout keeps them, and its update runs the
policy module alone: no backbone, no vision tower, no vocabulary.

Deviations: (1) modules see the states of text tokens, at plain positions (release: all positions);
(2) e^T is the text without the image's tokens (release: unfilled placeholders stay); (3) one merge
everywhere, zero-initialised (release: two, whose logits disagree); (4) files are mixed by their
numbers of rows, batches filled by tokens, rows over 2,048 tokens (SFT 4,096) cut at a message or
left out; (5) pictures keep their shape within --image-tokens (release: 280 x 420).

    from model import Agent
    agent = Agent.from_run("runs/tiny/rl-mini-dapo-latent-s0")
    print(agent.chat("What do you see?", image="picture.png", system="You are ..."))
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import datetime
import fcntl
import hashlib
import io
import json
import math
import os
import random
import resource
import shlex
import shutil
import sys
import threading
import time
import zipfile
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path

# Read when torch loads (so the other files import this one before torch): OpenMP threads that wait
# spin only briefly. By default any other load on the machine makes a step many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
PARENT = os.getppid()           # torchrun; read now, for it may be gone when torch has loaded

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer, Qwen2_5_VLRotaryEmbedding)
# Without torchvision the PIL processor is the only one.
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil, smart_resize)

transformers.utils.logging.disable_progress_bar()       # of its own loading
LOGITS_AT_ONCE = 2 ** 24     # vocabulary logits that exist at a time in a loss: 64 MiB in fp32


# ---- The five modules ------------------------------------------------------------------------


def recomputed(function):
    """`function`, what it makes inside computed again in the backward pass instead of kept."""
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def run_layers(layers, x: Tensor, rotary, positions: Tensor, cache=None, mask=None,
               recompute: bool = False) -> Tensor:
    """Decoder layers over x (B, T, d) at positions (3, B, T) or (B, T); no final norm.

    `mask` (B, 1, T, keys) bool, True = may attend; None is plain causal (or one new token).
    `recompute` keeps a layer's input alone for the backward pass, and runs the layer again there.
    """
    rope = rotary(x, positions.expand(3, -1, -1))
    for layer in layers:
        run = recomputed(layer) if recompute and cache is None else layer
        # The cache by place: transformers 5.24 renames `past_key_values` to `cache`.
        x = run(x, mask, None, cache, position_embeddings=rope)
    return x


class CausalStack(nn.Module):
    """Decoder layers of the backbone's kind + final norm + linear head.

    The inverse dynamics model (4 layers) and the policy (8 layers) with a |C|-way head, and the
    token-level baseline's policy: the backbone's own last layers, norm and an untied head.
    """

    recompute = False       # compute layers again in the backward pass (--recompute)

    def __init__(self, text_config, n_layers: int, n_out: int):
        super().__init__()
        config = copy.deepcopy(text_config)
        config.num_hidden_layers = n_layers
        config.layer_types = ["full_attention"] * n_layers
        config._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(Qwen2_5_VLDecoderLayer(config, i) for i in range(n_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, n_out)
        self.rotary = Qwen2_5_VLRotaryEmbedding(config)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def hidden(self, x: Tensor, positions: Tensor, cache=None, mask=None) -> Tensor:
        """x (B, T, d) at positions (3, B, T) or (B, T), mask as in `run_layers` -> (B, T, d), what
        the head reads: normed."""
        x = run_layers(self.layers, x, self.rotary, positions, cache, mask, self.recompute)
        return self.norm(x.to(self.norm.weight.dtype))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, d) at positions (3, B, T) or (B, T) -> logits (B, T, n_out)."""
        return self.head(self.hidden(x, positions))


class WorldModel(nn.Module):
    """The merge: language world model f_world(s_t, a_t) up to its frozen head (section 3). The
    whole is `Agent.next_token_logits` in decoding, `Agent.world_logprobs` in training.

    x = s; twice: x = x + SwiGLU([x, c]). The last projections start at zero, so an untrained
    world model is the base model; the state already carries the final norm.
    """

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "gate": nn.Linear(2 * width, mlp_width, bias=False),
            "up": nn.Linear(2 * width, mlp_width, bias=False),
            "down": nn.Linear(mlp_width, width, bias=False)}) for _ in range(2))
        for block in self.blocks:
            nn.init.zeros_(block["down"].weight)

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        """s, c (..., d) -> x (..., d), the input of the frozen lm_head."""
        x = s
        for block in self.blocks:
            z = torch.cat([x, c], -1)
            x = x + block["down"](F.silu(block["gate"](z)) * block["up"](z))
        return x


class GaussianMap(nn.Module):
    """Diagonal Gaussian over one embedding space given the other (section 3, projectors).

    mu(e) = e + MLP(e), the last layer zero-initialised: the plain form of the paper was worse
    than the identity, since both embeddings of a token are close. log var in (-1, 1) by Tanh.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mlp, self.mlp_log_var = (
            nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, width))
            for _ in range(2))
        for head in (self.mlp, self.mlp_log_var):
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def mu(self, e: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return e + self.mlp(e)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """(..., d) -> mu and log var in (-1, 1), (..., d) each."""
        return self.mu(e), torch.tanh(self.mlp_log_var(e))


class Projector(nn.Module):
    """P: e^T -> e^{V,T} and P': e^{V,T} -> e^T."""

    def __init__(self, width: int):
        super().__init__()
        self.P, self.P_inv = GaussianMap(width), GaussianMap(width)


def in_chunks(function, rows: int, *tensors: Tensor) -> Tensor:
    """function(*tensors), (K, ...) each -> (K, ...), computed `rows` rows at a time, again in the
    backward pass, so that what it makes inside never exists for all K at once."""
    chunks = zip(*(x.split(max(1, rows)) for x in tensors))
    return torch.cat([recomputed(function)(*chunk) for chunk in chunks])


def token_logprobs(head: nn.Linear, x: Tensor, targets: Tensor, bias: Tensor | float = 0.0,
                   chunk: int = LOGITS_AT_ONCE) -> Tensor:
    """log softmax(head(x) + bias) at targets, in chunks recomputed in the backward pass.

    x (K, d), targets (K,), bias (vocab,) or one number -> (K,) fp32. At most `chunk` logits exist
    at a time, so memory never grows as tokens x vocabulary.
    """
    def piece(x, targets):
        return -F.cross_entropy(head(x).float() + bias, targets, reduction="none")
    return in_chunks(piece, chunk // head.out_features, x, targets)


def code_usage(counts: Tensor) -> dict[str, float]:
    """Codes in use and perplexity of their marginal, from counts (|C|,). Perplexity exp(H) is
    |C| when all are used alike and 1 when the codebook has collapsed."""
    p = counts.double() / counts.sum().clamp(min=1e-12)
    return {"codes_used": int((counts > 0).sum()),
            "code_perplexity": torch.special.entr(p).sum().exp().item()}


def key_seed(*keys) -> int:
    """A seed that depends on the keys alone: the same for any split over ranks and batches."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# ---- Agent -----------------------------------------------------------------------------------


def load_base(path: str | Path, dtype: torch.dtype) -> tuple:
    """(model, tokenizer, image processor) of a Qwen2.5-VL folder or hub id, without torchvision.

    Safetensors only, no remote code. Raises `UserError` for anything that is not Qwen2.5-VL.
    """
    if str(path).startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"--model {path}: no such folder (any more); name where it lies")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        if config.model_type != "qwen2_5_vl" or getattr(config, "quantization_config", None):
            raise ValueError(f"a {config.model_type}, perhaps quantised, is no plain Qwen2.5-VL")
        model, loaded = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True,
            output_loading_info=True)
        if loaded["missing_keys"]:
            raise ValueError(f"weights are missing: {min(loaded['missing_keys'])} and others")
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if not tokenizer.encode("Hello", add_special_tokens=False):     # made without its files
            raise ValueError("its tokenizer reads nothing; are all tokenizer files there?")
        processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        if tokenizer.chat_template is None:     # older snapshots keep it beside the processor
            file = Path(transformers.utils.cached_file(path, "chat_template.json"))
            tokenizer.chat_template = json.loads(file.read_text())["chat_template"]
    except Exception as error:                  # a library says in many ways what a folder lacks
        raise UserError(f"--model {path}: cannot be loaded ({error!r:.300})") from None
    return model, tokenizer, processor


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's first values as bfloat16: the same in any dtype and place."""
    first = [p.detach().flatten()[:16].to(torch.bfloat16).float().cpu() for p in model.parameters()]
    return hashlib.sha256(torch.cat(first).numpy().tobytes()).hexdigest()[:16]


def text_positions(x: Tensor) -> Tensor:
    """Plain positions 0..M-1 of text tokens, x (B, M, ...) -> (B, M)."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters to `dtype` in place, but not the rotary frequencies, which stay fp32."""
    for p in module.parameters():
        p.data = p.data.to(dtype)
    return module


class Agent(nn.Module):
    """The frozen backbone and the modules of the method that a stage needs.

    Attributes (None until made or loaded): `projector`, `idm`, `codebook` (|C|, d), `world`,
    `policy`. `space` is "latent" (actions are codes) or "token" (the baseline, whose policy is
    the backbone's last layers; the trunk below stays frozen). `structure` holds the number
    of codes, layer counts, image tokens and ablations.
    """

    def __init__(self, backbone, encoder: Encoder, structure: dict):
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        self.encoder, self.structure = encoder, dict(structure)
        self.space, self.recompute = "latent", False
        self.projector = self.idm = self.codebook = self.world = self.policy = None
        text = backbone.model.language_model
        self.text_config, self.width = text.config, text.config.hidden_size
        self.base_hash = fingerprint(backbone)
        bias = torch.zeros(backbone.lm_head.out_features)
        bias[encoder.vision_ids] = float("-inf")        # never sampled, never scored
        bias[len(encoder.tokenizer):] = float("-inf")   # rows of the head that are no tokens
        self.register_buffer("token_bias", bias.to(backbone.device), persistent=False)

    @classmethod
    def from_base(cls, args, dtype: torch.dtype | None = None) -> Agent:
        """The backbone alone, on this rank's device, with the structure that `args` asks for."""
        device = device_of(args)
        auto = "bfloat16" if device == "cuda" else "float32"
        dtype = dtype or getattr(torch, auto if args.dtype == "auto" else args.dtype)
        path = model_root(args) / "base" if args.model == "tiny" else args.model
        model, tokenizer, processor = load_base(path, dtype)
        encoder = Encoder(tokenizer, processor, model, args.image_tokens)
        agent = cls(model.to(device), encoder, {name: getattr(args, name) for name in STRUCTURAL})
        agent.recompute = args.recompute
        if args.model == "tiny":                        # small enough to hash the whole file
            agent.base_hash = file_hash(path / "model.safetensors")
        return agent

    def make(self, *names: str, seed: int = 0) -> Agent:
        """Create untrained modules by name, initialised from `seed`, fp32, trainable."""
        sizes, config = self.structure, self.text_config
        makers = {
            "projector": lambda: Projector(self.width),
            "idm": lambda: CausalStack(config, sizes["idm_layers"], sizes["codes"]),
            # Code vectors of unit scale: at the usual 0.02 the merge can hardly see them.
            "codebook": lambda: nn.Embedding(sizes["codes"], self.width),
            "world": lambda: WorldModel(self.width, config.intermediate_size),
            "policy": lambda: CausalStack(config, sizes["policy_layers"], sizes["codes"])}
        for name in names:
            torch.manual_seed(key_seed(seed, name))
            setattr(self, name, makers[name]().to(self.device))
        return self

    def make_token_policy(self) -> Agent:
        """The token-level baseline: its policy is a copy of the backbone's last layers, norm and
        output head, fp32, untied."""
        text, policy = self.backbone.model.language_model, CausalStack(self.text_config, 0, 1)
        last = text.layers[-self.structure["policy_layers"]:]
        policy.layers, policy.norm, policy.rotary, policy.head = copy.deepcopy(
            (last, text.norm, text.rotary_emb, self.backbone.lm_head))
        for index, layer in enumerate(policy.layers):
            layer.self_attn.layer_idx = index       # its place in a cache
        self.space, self.policy = "token", policy.float().requires_grad_(True)
        return self

    def load_run(self, folder: Path, skip: tuple[str, ...] = ()) -> Agent:
        """Load what `folder` and its parents trained, the nearest last; frozen until asked for."""
        folder, config = Path(folder), read_config(folder)
        path = folder / "model.safetensors"
        if config["parent"]:
            parent = Path(os.path.normpath(folder / config["parent"]))
            self.load_run(parent, skip)
            if read_config(parent)["sha256"] != config["parent_sha256"]:
                raise UserError(f"{folder}: trained on an earlier {parent.name}; redo it (--fresh)")
        if config["base"] != self.base_hash:
            raise UserError(f"{folder}: trained on another base than --model; redo it (--fresh)")
        if not path.exists() or file_hash(path) != config["sha256"]:
            raise UserError(f"{path}: not what its run finished with; restore or redo it (--fresh)")
        tensors = load_file(path, device=str(self.device))
        if not all(value.isfinite().all() for value in tensors.values()):
            raise UserError(f"{path}: holds weights that are not finite; redo the run (--fresh)")
        if config["space"] == "token" and self.space != "token":
            self.make_token_policy()
        for name in sorted({key.split(".")[0] for key in tensors} - set(skip)):
            weights = {k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
            try:
                if getattr(self, name, None) is None:
                    self.make(name)
                module = getattr(self, name).requires_grad_(False)
                if name == "backbone":      # the release's SFT trains and keeps a part of it
                    weights = {**module.state_dict(), **weights}
                module.load_state_dict(weights)
            except (KeyError, RuntimeError) as error:
                raise UserError(f"{path}: {name} does not fit; redo it: {error!r:.99}") from None
        return self

    @classmethod
    def from_run(cls, folder: str | Path, device: str = "auto", dtype: str = "auto") -> Agent:
        """A trained agent from its run folder alone, without inverse dynamics."""
        args = argparse.Namespace(**read_config(folder)["args"])
        args.device, args.dtype, args.recompute = device, dtype, False
        # The base of `tiny` stands beside the run, wherever runs/ was moved to.
        args.run_root = Path(folder).resolve().parent.parent
        set_threads(args.model)
        agent = cls.from_base(args).load_run(folder, skip=("idm",)).eval()
        agent.train_only()
        return agent

    @property
    def device(self) -> torch.device:
        return self.token_bias.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    def autocast(self):
        """fp32 master weights computed in the backbone's dtype; a no-op in fp32."""
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def train_only(self, *names: str) -> dict[str, nn.Module]:
        """Freeze all but the named modules, and keep what is frozen in the backbone's dtype;
        returns the named ones, whose fp32 weights train."""
        for name, module in self.named_children():
            module.requires_grad_(name in names)
            if isinstance(module, CausalStack):
                module.recompute = self.recompute
            if name not in names:
                cast(module, self.dtype)
        return {name: getattr(self, name) for name in names}

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., d)."""
        return self.backbone.model.language_model.embed_tokens(ids)

    def embed(self, batch: Batch) -> Tensor:
        """(B, T, d): token embeddings with the image features in their places."""
        x = self.embed_tokens(batch.ids)
        if batch.pixels is not None:
            x = x.masked_scatter((batch.ids == self.encoder.image_token)[..., None],
                                 self.image_features(batch).to(x.dtype))
        return x

    def image_features(self, batch: Batch) -> Tensor:
        """(visual tokens of all images, d)."""
        return torch.cat(self.backbone.model.get_image_features(
            pixel_values=batch.pixels, image_grid_thw=batch.grids).pooler_output)

    def trunk(self, x: Tensor, positions: Tensor, cache=None, mask=None) -> Tensor:
        """Embeddings -> what modules downstream read: e (normed), or in token space the input
        of the policy's first layer. x (B, T, d) at positions (3, B, T) or (B, T) -> (B, T, d)."""
        text = self.backbone.model.language_model
        layers = text.layers[:-len(self.policy.layers)] if self.space == "token" else text.layers
        x = run_layers(layers, x, text.rotary_emb, positions, cache, mask, self.recompute)
        return x if self.space == "token" else text.norm(x)

    def embeddings(self, batch: Batch, cache=None) -> Tensor:
        """e^{V,T} of rows with an image and e^T of rows without, at their text tokens: (B, M, d).
        Right-padded causal pass, latent space (for token space see `trunk`).
        """
        return self.at_text(self.trunk(self.embed(batch), batch.positions, cache), batch)

    @staticmethod
    def at_text(x: Tensor, batch: Batch) -> Tensor:
        """x (B, T, d) at the rows' text tokens alone: (B, M, d)."""
        return x.gather(1, batch.text_index[..., None].expand(-1, -1, x.shape[-1]))

    def text_states(self, tokens: Tensor) -> Tensor:
        """e^T: the whole backbone on text tokens alone at plain positions, in any space. Token ids
        (B, M) -> (B, M, d)."""
        text = self.backbone.model.language_model
        x, positions = text.embed_tokens(tokens), text_positions(tokens)
        return text.norm(run_layers(text.layers, x, text.rotary_emb, positions))

    def project(self, e: Tensor, has_image: Tensor) -> Tensor:
        """States from embeddings: e^{V,T} as it is, mu_P(e^T) for rows without an image.

        e (B, M, d), has_image (B,) -> same shape and dtype."""
        if self.projector is None or self.space == "token":
            return e
        with self.autocast():
            return torch.where(has_image[:, None, None], e, self.projector.P.mu(e).to(e.dtype))

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """States of text tokens (B, M, d), detached: what every module reads."""
        return self.project(self.embeddings(batch), batch.has_image)

    def idm_logits(self, states: Tensor) -> Tensor:
        """Code logits of inverse dynamics, (B, M, d) -> (B, M - 1, |C|): at t they have seen
        x_{t+1}."""
        return self.idm(states, text_positions(states))[:, 1:]

    def next_token_logits(self, states: Tensor, actions: Tensor) -> Tensor:
        """f_world(s, a) -> logits over the vocabulary, vision tokens masked.

        states (N, d), actions (N,) -> (N, vocab): whole rows of logits, for decoding. Losses over
        many positions take `world_logprobs`, in chunks."""
        x = self.world(states, self.codebook(actions)).to(states.dtype)
        return self.backbone.lm_head(x).float() + self.token_bias

    def policy_inputs(self, batch: Batch, cache=None) -> tuple[Tensor, Tensor, Tensor]:
        """What the policy reads of P prompts: inputs (P, L, d), their positions (3, P, L), and
        which are real (P, L). States at plain text positions; in token space the inputs of its
        first layer, at the backbone's own positions."""
        if self.space == "token":
            inputs = self.trunk(self.embed(batch), batch.positions, cache)
            return inputs, batch.positions, text_positions(batch.ids) < batch.lengths[:, None]
        states = self.project(self.embeddings(batch, cache), batch.has_image)
        return states, text_positions(states).expand(3, -1, -1), batch.real

    def action_logits(self, h: Tensor, policy: CausalStack | None = None) -> Tensor:
        """Normed hidden states (..., d) -> fp32 logits of the actions (..., n) under the agent's
        policy or another."""
        logits = (policy or self.policy).head(h).float()
        return logits + self.token_bias if self.space == "token" else logits

    def next_tokens(self, s: Tensor, actions: Tensor) -> Tensor:
        """x_{t+1} of states (N, d) and actions (N,): (N,)."""
        if self.space == "token":
            return actions
        if "codebook" in self.structure["without"]:
            return self.likeliest(s).gather(1, actions[:, None])[:, 0]
        return self.next_token_logits(s, actions).argmax(-1)

    def likeliest(self, s: Tensor) -> Tensor:
        """Control without a learnt codebook: action j is the j-th likeliest token under the lm_head
        of the state that the policy reads, (K, d) -> (K, |C|)."""
        head = self.backbone.lm_head

        def piece(s):
            return (head(s).float() + self.token_bias).topk(self.structure["codes"]).indices
        return in_chunks(piece, LOGITS_AT_ONCE // head.out_features, s)

    def world_logprobs(self, s: Tensor, c: Tensor, targets: Tensor) -> Tensor:
        """log f_world(x_{t+1} | s_t, c_t): states, code vectors (K, d), targets (K,) -> (K,)."""
        with self.autocast():
            x = self.world(s, c).to(s.dtype)
            return token_logprobs(self.backbone.lm_head, x, targets, self.token_bias)

    def acting(self) -> Agent:
        """The agent that rollouts run: this one, but for a policy that trains in fp32, of which it
        has a copy in the backbone's dtype (as `train_only` gives to all that is frozen)."""
        if self.policy.head.weight.dtype == self.dtype:
            return self
        agent = copy.copy(self)                     # it shares all else
        agent._modules = {**self._modules, "policy": cast(copy.deepcopy(self.policy), self.dtype)}
        return agent

    def chat(self, message: str, image=None, system: str = "", history: list | None = None,
             temperature: float = 0.0, max_new_tokens: int = 256, seed: int = 0) -> str:
        """One answer to one message; `history` are earlier turns, `image` is a path or PIL image,
        which stands before the message unless an `<image>` says where."""
        if self.policy is None:
            raise UserError("chat: this run has no policy; load an sft-* or rl-* run")
        messages = [{"role": "system", "content": system}] if system else []
        messages += [*(history or []), {"role": "user", "content": message}]
        if image is not None and not any("<image>" in m["content"] for m in messages):
            messages[-1] = {"role": "user", "content": "<image>" + message}
        row = {"id": "chat", "messages": messages, "images": [] if image is None else [image]}
        prompt = self.encoder.encode(row, prompt=True)
        return rollout(self, [prompt], 1, max_new_tokens, temperature, [seed])[0].texts[0]


# ---- Rollouts --------------------------------------------------------------------------------


class KVCache:
    """Keys and values of a stack in buffers of fixed length: a step writes one column and reads
    a view, nothing is copied. Decoder layers of transformers accept it as their cache.
    `real` (B, length) bool tells tokens from padding; `buffers` are (2, B, heads, length, head_dim)
    a layer, for keys and values, of which the first `end` columns are filled."""

    def __init__(self, real: Tensor):
        self.real, self.padded, self.buffers, self.end = real, not bool(real.all()), {}, 0

    def mask(self) -> Tensor | None:
        """(B, 1, 1, keys) bool: what one new token may attend to; None if nothing is padding."""
        return self.real[:, None, None, :self.end + 1] if self.padded else None

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__):
        """keys, values (B, heads, q, head_dim) -> all of the layer's so far (B, heads, n, ..)."""
        B, H, q, D = keys.shape
        if layer not in self.buffers:
            self.buffers[layer] = keys.new_empty(2, B, H, self.real.shape[1], D)
        self.end += q if layer == 0 else 0              # the first layer comes first
        for buffer, new in zip(self.buffers[layer], (keys, values)):
            buffer[:, :, self.end - q:self.end] = new
        return self.buffers[layer][:, :, :, :self.end].unbind()

    def expand(self, group: int, extra: int) -> KVCache:
        """The cache of P prompts, (P, heads, n, ..) a layer, as one of P * group rows with room for
        `extra` more tokens: (P * group, heads, n + extra, ..)."""
        out = KVCache(F.pad(self.real, (0, extra), value=True).repeat_interleave(group, 0))
        for layer, buffer in self.buffers.items():
            out.update(*buffer[:, :, :, :self.end].repeat_interleave(group, 1), layer)
        return out

    def keep(self, rows: Tensor):
        """Drop all rows but `rows`, (n,) indices (finished answers stop costing)."""
        self.real = self.real[rows]
        for layer, buffer in self.buffers.items():          # one at a time, to free the old ones
            self.buffers[layer] = buffer[:, rows]


def choose(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one action a row by inverse CDF, or the best at temperature 0.

    logits (N, n), uniform (N,) in [0, 1) -> actions (N,), their log-probs (N,), at temperature 0
    those of temperature 1. One number a token makes the draw the same for any batch split.
    """
    logps = F.log_softmax(logits.float() / (temperature or 1.0), -1)
    if temperature == 0:
        actions = logps.argmax(-1)
    else:
        cdf = logps.double().exp().cumsum(-1)
        actions = torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)
        actions = actions[:, 0].clamp(max=logits.shape[-1] - 1)
    return actions, logps.gather(1, actions[:, None])[:, 0]


@dataclass
class Group:
    """The G answers to one prompt, of at most T tokens, with all that an update needs.

    What the policy read is kept: states, or in token space the inputs of its first layer.
    `inputs[:, t]` is what it read when it took action t: at t = 0 that of the prompt's last token.
    """
    texts: list[str]            # G decoded answers
    tokens: Tensor              # (G, T) x_{t+1} given action t
    actions: Tensor             # (G, T)
    logps: Tensor               # (G, T) log pi(a_t) at the sampling temperature and support
    mask: Tensor                # (G, T) bool: up to and including the end of turn
    finished: Tensor            # (G,) bool: ended its turn within max_new_tokens
    inputs: Tensor              # (G, T, d)
    positions: Tensor           # (G, T) of the inputs
    prompt: Tensor              # (1, L, d) inputs of the prompt's tokens before its last
    prompt_positions: Tensor    # (3, 1, L)
    rewards: Tensor | None = None       # (G,) of the task, once judged; NaN where that failed


@torch.no_grad()
def rollout(agent: Agent, prompts: list[Example], group: int, max_new_tokens: int,
            temperature: float = 1.0, seeds: list[int] | None = None,
            check_every: int = 4) -> list[Group]:
    """Sample `group` answers to each of P prompts (section 4), until the end of turn:
    a_t ~ pi(. | s_1..s_t), x_{t+1} = argmax f_world(s_t, a_t), or in token space x_{t+1} = a_t.

    Prompt and image are encoded once and the caches expanded to the group; prompts of different
    lengths stay exact because padded keys are masked and every position is explicit. `seeds`
    (one a prompt) fix the draws. `temperature` 0 takes the best action. Finished answers leave the
    batch every `check_every` tokens, which is also the loop's only host sync.
    """
    agent, T, N = agent.acting(), max_new_tokens, len(prompts) * group
    draws = [torch.rand(group, T, generator=torch.Generator().manual_seed(seed))
             for seed in seeds or [0] * len(prompts)]
    uniform = torch.cat(draws).to(agent.device)                                     # (N, T)

    # Prefill: trunk and policy over each of P prompts, once for all its answers.
    batch = agent.encoder.collate(prompts).to(agent.device)
    cache = KVCache(text_positions(batch.ids) < batch.lengths[:, None])
    inputs, positions, real = agent.policy_inputs(batch, cache)     # (P, L, d), (3, P, L), (P, L)
    policy_cache = KVCache(real)
    hidden = agent.policy.hidden(inputs, positions, policy_cache)
    each, last = torch.arange(len(prompts), device=agent.device), real.sum(1) - 1   # (P,) each
    start = positions[0, each, last]        # a prompt ends in text: its three positions are equal

    # From here on one row per answer. `rows` holds what running answers need; finished ones leave.
    cache, policy_cache = cache.expand(group, T), policy_cache.expand(group, T)
    rows = {"position": batch.positions[0, each, batch.lengths - 1] + 1,
            "policy_position": start + 1, "has_image": batch.has_image,
            "s": inputs[each, last], "h": hidden[each, last]}
    rows = {name: x.repeat_interleave(group, 0) for name, x in rows.items()}
    rows["answer"] = torch.arange(N, device=agent.device)
    tokens = torch.full((N, T), agent.encoder.pad, device=agent.device)
    actions, logps = torch.zeros_like(tokens), torch.zeros(N, T, device=agent.device)
    read = inputs.new_zeros(N, T, inputs.shape[-1])         # by the policy, before each action
    stop_ids = agent.encoder.stop_ids.to(agent.device)
    for t in range(T):
        running, s = rows["answer"], rows["s"]
        a, logp = choose(agent.action_logits(rows["h"]), uniform[running, t], temperature)
        x = agent.next_tokens(s, a)
        tokens[running, t], actions[running, t] = x, a
        logps[running, t], read[running, t] = logp, s
        if t + 1 == T:
            break
        if (t + 1) % check_every == 0:
            stopped = torch.isin(tokens[running, :t + 1], stop_ids).any(1)
            keep = (~stopped).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < len(running):
                rows, x = {name: value[keep] for name, value in rows.items()}, x[keep]
                cache.keep(keep)
                policy_cache.keep(keep)
        # One new token a row through trunk and policy, whose caches hold those before it.
        e = agent.trunk(agent.embed_tokens(x)[:, None], (rows["position"] + t)[:, None], cache,
                        cache.mask())
        s = agent.project(e, rows["has_image"])                                     # (n, 1, d)
        h = agent.policy.hidden(s, (rows["policy_position"] + t)[:, None], policy_cache,
                                policy_cache.mask())
        rows["s"], rows["h"] = s[:, 0], h[:, 0]

    ends = torch.isin(tokens, stop_ids)
    mask, groups = ends.cumsum(1) - ends.int() == 0, []     # up to and including the first end
    for p in range(len(prompts)):
        answers = slice(p * group, (p + 1) * group)
        n, L = int(mask[answers].sum(1).max()), int(last[p])
        spoken = zip(tokens[answers].cpu(), (mask & ~ends)[answers].cpu())
        texts = [agent.encoder.tokenizer.decode(ids[kept]) for ids, kept in spoken]
        places = (start[p] + torch.arange(n, device=agent.device)).expand(group, -1)
        groups.append(Group(texts, tokens[answers, :n], actions[answers, :n], logps[answers, :n],
                            mask[answers, :n], ends[answers].any(1), read[answers, :n], places,
                            inputs[p:p + 1, :L], positions[:, p:p + 1, :L]))
    return groups


def pack(rows: list[Example], group: int, new: int, tokens_at_once: int) -> list[list[int]]:
    """Rows in their order, as lists of indices. A list takes rows while their number x `group`
    answers x (the longest row + `new` tokens) is within `tokens_at_once`; one row at least."""
    parts, longest = [], 0
    for i, row in enumerate(rows):
        longest = max(longest, len(row))
        if not parts or (len(parts[-1]) + 1) * group * (longest + new) > tokens_at_once:
            parts, longest = parts + [[]], len(row)
        parts[-1].append(i)
    return parts


def replay(policy: CausalStack, group: Group) -> Tensor:
    """The policy's normed hidden states at every answer position, from what it read: (G, T, d).

    Each layer passes over the prompt once, with gradient if enabled, and its keys and values are
    expanded to the answers. Equals the rollout's own incremental pass (tested).
    """
    (G, T, _), L = group.inputs.shape, group.prompt.shape[1]
    # (1, 1, T, L + T): an answer's position t sees the prompt and the answer's positions 0..t.
    mask = torch.ones(1, 1, T, L + T, dtype=torch.bool, device=group.inputs.device).tril(L)

    def both(layer, prompt, x):
        cache = transformers.DynamicCache()     # a KVCache writes in place: no gradient passes
        prompt = run_layers([layer], prompt, policy.rotary, group.prompt_positions, cache)
        cache.batch_repeat_interleave(G)
        return prompt, run_layers([layer], x, policy.rotary, group.positions, cache, mask)
    prompt, x = group.prompt, group.inputs
    for layer in policy.layers:
        prompt, x = (recomputed(both) if policy.recompute else both)(layer, prompt, x)
    return policy.norm(x.to(policy.norm.weight.dtype))


# ---- Data: from rows to batches --------------------------------------------------------------

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                 "<|video_pad|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"   # what `<image>` in a row stands for
Image.MAX_IMAGE_PIXELS = 64_000_000                     # PIL refuses twice this: no bombs
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}


class UserError(Exception):
    """A mistake outside the code: one line naming file, row and remedy; exit status 2."""
    status = 2


class UnusableRow(UserError):
    """A row that a corpus can do without: left out and counted there, an error elsewhere."""


def image_source(image, folder) -> str:
    """A row's picture as a path or a data URL: from a path, `file://`, a data URL, an object with
    "url", or with "bytes" (base64) or "path"."""
    if isinstance(image, dict):
        image = image.get("url") or (image.get("bytes") and f"data:;base64,{image['bytes']}") \
            or image["path"]
    if image.startswith(("http://", "https://")):
        raise UserError(f"picture {image:.120} is an address; download it and name the file")
    return image if image.startswith("data:") else str(Path(folder) / image.removeprefix("file://"))


def flatten(content) -> tuple[str, list]:
    """A message's content as text with `<image>` where a picture goes, and the pictures that its
    typed blocks bring."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise TypeError("the content of a message is neither text nor a list of blocks")
    text, images = "", []
    for block in content:
        if block["type"] == "text":
            text += block["text"]
        elif block["type"] in ("image", "image_url"):
            text += "<image>"
            if image := block.get(block["type"]) or block.get("url") or block.get("path"):
                images.append(image)
        else:
            raise TypeError(f"a block of type {block['type']}")
    return text, images


def normalise_row(raw, where: str, folder: Path, row_id: str) -> dict:
    """One row in the kit's form, or `UserError` naming `where` (file:line).

    Accepts `messages` (role/content, content a string with `<image>` or typed blocks), ShareGPT
    `conversations` (from/value) and plain `text`; `images` may be missing, [] or ["None"].
    """
    try:
        turns = []
        if "conversations" in raw:
            turns = [(m["from"], m["value"]) for m in raw["conversations"]]
            if isinstance(raw.get("system"), str):
                turns.insert(0, ("system", raw["system"]))
        elif "messages" in raw:
            turns = [(m["role"], m["content"]) for m in raw["messages"]]
        elif "text" in raw:      # in web text `<image>` is a tag of its own, no place for a picture
            turns = [("assistant", raw["text"].replace("<image>", "<img>"))]
        if not turns:
            raise UserError("no `messages` (or empty); fix or remove the row, see README, Rows")
        messages, images = [], []
        for role, content in turns:
            if role not in ROLES:
                raise UserError(f"role {role!r:.50} is not system, user (human) or assistant (gpt)")
            text, shown = flatten(content)
            messages.append({"role": ROLES[role], "content": text})
            images += shown
        images = images or raw.get("images") or raw.get("image") or []
        if not isinstance(images, list):
            images = [images]
        images = [image_source(image, folder) for image in images if image != "None"]
        if images and not any("<image>" in m["content"] for m in messages):
            # Leading if absent: before the first user message.
            first = next(m for m in messages if m["role"] == "user")
            first["content"] = "<image>" * len(images) + "\n" + first["content"]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (AttributeError, KeyError, StopIteration, TypeError) as error:
        raise UserError(f"{where}: is no row of dialogue ({error!r:.80}); see README") from None
    if raw.get("id") is not None:
        row_id = str(raw["id"])
    return {**raw, "messages": messages, "images": images, "id": row_id, "where": where}


class Rows:
    """Rows by number: those of JSON and JSONL files, or of lists in memory (the toy world). Of a
    JSONL file the places of its rows alone are kept in memory.

    A row without an id is named by its file's place in the list, its name and the line, wherever
    it lies. Errors: `UserError` with file:line."""

    def __init__(self, sources: list, image_root: str | None = None):
        self.sources, self.image_root = sources, image_root
        self.parts = [places_of_rows(x) if isinstance(x, str) else x for x in sources]
        self.ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, n: int) -> dict:
        k = int(np.searchsorted(self.ends, n, side="right"))
        source, part = self.sources[k], self.parts[k]
        item = part[n - int(self.ends[k])]          # below 0: counted from the source's end
        if not isinstance(source, str):
            return item
        path, (line, raw) = Path(source), item
        where = f"{path}:{line}"
        if isinstance(part, np.ndarray):            # places in a JSONL file
            with open(path, "rb") as f:
                f.seek(raw)
                raw = parse_json(f.readline(), where)
        return normalise_row(raw, where, self.image_root or path.parent, f"{k}/{path.name}:{line}")


def parse_json(text: bytes, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON in UTF-8 ({error!s:.80}); fix or remove it") from None


def places_of_rows(file: str) -> np.ndarray | list[tuple[int, dict]]:
    """The rows of a JSONL file as (line, byte offset), (n, 2); of one that is a JSON array as
    (number, row)."""
    try:
        with open(file, "rb") as f:
            if f.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                return list(enumerate(parse_json(f.read(), file), 1))
            places, offset = array("q"), 0
            for line, text in enumerate(f, 1):
                if text.strip():
                    places.extend((line, offset))
                offset += len(text)
            return np.array(places).reshape(-1, 2)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error}); check the path") from None


def open_image(image, where: str, size: tuple[int, int] | None = None):
    """(height, width) of an upright picture from its header alone, or with `size` its RGB pixels
    at that (height, width), a PIL image; transparent ground is white. `UnusableRow` names row and
    file."""
    try:
        file = image
        if isinstance(image, str) and image.startswith("data:"):
            file = io.BytesIO(base64.b64decode(image.partition(",")[2]))
        picture = image if isinstance(image, Image.Image) else Image.open(file)
        if size is None:
            width, height = picture.size
            if picture.format == "TIFF":        # newer Pillows have turned its size, 10.4 not
                width, height = picture.tag_v2[256], picture.tag_v2[257]
            # PNG's own getexif would decode it.
            turned = Image.Image.getexif(picture).get(274) in range(5, 9)
            return (width, height) if turned else (height, width)
        picture.draft("RGB", (max(size), max(size)))    # a large JPEG is decoded at a smaller scale
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):                # 16 bits a pixel
            picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB").resize(size[::-1], Image.BICUBIC)
    except Exception as error:                          # PIL raises whatever damage leads to
        raise UnusableRow(f"{where}: image {str(image)!r:.120} cannot be used ({error!s:.80}); "
                          "replace it (see --image-root) or remove the row") from None


@dataclass
class Example:
    """One tokenised row: T tokens, image placeholders expanded, M of them text."""
    id: str
    where: str                  # file:line for errors
    ids: Tensor                 # (T,) token ids
    positions: Tensor           # (T, 3) temporal, height, width
    text_index: Tensor          # (M,) where each text token stands in the row
    tokens: Tensor              # (M,) text token ids
    predicts: Tensor            # (M,) bool: tokens[t + 1] is to be predicted at t
    seen_image: Tensor          # (M,) bool: after the row's first image
    images: list                # paths, data URLs or PIL images
    grids: Tensor               # (n, 3) patches in time, height, width
    pixels: Future | None = None            # (patches, 1176) of the images, being decoded

    def __len__(self):
        return len(self.ids)


class Batch:
    """B rows, right-padded: the backbone's view (length T) and the text tokens' view (length M).

    Right padding with a causal mask and explicit positions is exact for the real tokens.
    """

    def __init__(self, rows: list[Example], pad: int, pixels: Tensor | None):
        def padded(name, value=0):
            return nn.utils.rnn.pad_sequence([getattr(row, name) for row in rows],
                                             batch_first=True, padding_value=value)
        self.row_ids = [row.id for row in rows]
        self.ids = padded("ids", pad)                                       # (B, T)
        self.positions = padded("positions").permute(2, 0, 1)               # (3, B, T)
        self.text_index = padded("text_index")                              # (B, M)
        self.tokens = padded("tokens", pad)                                 # (B, M)
        self.predicts = padded("predicts")                                  # (B, M) bool
        self.seen_image = padded("seen_image")                              # (B, M) bool
        self.lengths = torch.tensor([len(row) for row in rows])             # (B,)
        self.text_lengths = torch.tensor([len(row.tokens) for row in rows])     # (B,)
        self.has_image = torch.tensor([len(row.grids) > 0 for row in rows])     # (B,) bool
        self.grids = torch.cat([row.grids for row in rows])                 # (images, 3)
        self.pixels = pixels                            # (patches, 1176) of all images, or None

    @property
    def real(self) -> Tensor:
        """(B, M) bool: not padding."""
        return text_positions(self.tokens) < self.text_lengths[:, None]

    @property
    def text_only(self) -> Tensor:
        """(B, M) bool: tokens of rows without an image."""
        return self.real & ~self.has_image[:, None]

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Where a token is predicted, (B, M - 1) bool, and those K next tokens, (K,)."""
        where = self.predicts[:, :-1]
        return where, self.tokens[:, 1:][where]

    def to(self, device) -> Batch:
        """This batch, its tensors moved."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


class Encoder:
    """Tokenizer and image processor: conversation -> Example -> Batch."""

    def __init__(self, tokenizer, processor, model, image_tokens: float = math.inf):
        """image_tokens: most tokens an image may have, within the processor's own limits.
        `UserError` for a chat template in which the assistant's turns cannot be found."""
        self.tokenizer, self.processor, config = tokenizer, processor, model.config
        self.rope_index = model.model.get_rope_index
        self.merge, self.image_tokens = config.vision_config.spatial_merge_size, image_tokens
        self.image_token = config.image_token_id
        self.pad = tokenizer.pad_token_id or 0          # some tokenizers have none
        self.longest = config.text_config.max_position_embeddings
        ids_of = tokenizer.convert_tokens_to_ids
        self.vision_ids = torch.tensor(ids_of(list(VISION_TOKENS)))
        self.stop_ids = torch.tensor(ids_of(["<|im_end|>", "<|endoftext|>"]))
        self.markup = {*tokenizer.all_special_tokens, *VISION_TOKENS, "<|im_start|>", "<|im_end|>"}
        self.turn = tokenizer.encode("<|im_start|>assistant", add_special_tokens=False)
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        if "<|im_start|>assistant" not in tokenizer.apply_chat_template(probe, tokenize=False):
            raise UserError("--model: its chat template has no <|im_start|>assistant; restore it")
        self.side = processor.patch_size * self.merge       # pixels that a token is wide and high
        self.max_pixels = min(processor.size["longest_edge"], image_tokens * self.side ** 2)
        self.min_pixels = min(processor.size["shortest_edge"], self.max_pixels)

    def grid(self, image, where: str) -> tuple[int, int, int]:
        """Patches (time, height, width) of an image, from its header alone."""
        height, width = open_image(image, where)
        try:
            height, width = smart_resize(height, width, self.side, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise UnusableRow(f"{where}: image cannot be resized ({error}); replace it") from None
        down, across = height // self.side, width // self.side
        if down * across > self.image_tokens:       # a thin one, a cell wide
            down, across = min(down, self.image_tokens), min(across, self.image_tokens)
        return 1, down * self.merge, across * self.merge

    def check(self, row: dict):
        """Raises `UnusableRow` for text that cannot be tokenised as what it says."""
        where = row.get("where", f"row {row['id']}")
        text = "\n".join(m["content"] for m in row["messages"])
        if text.count("<image>") != len(row["images"]):
            raise UnusableRow(f"{where}: {text.count('<image>')} `<image>` placeholders but "
                              f"{len(row['images'])} images; make them equal")
        for token in self.markup:
            if token in text:
                raise UnusableRow(f"{where}: its text contains a literal {token}; remove it")
        if text != text.encode("utf-8", "ignore").decode():
            raise UnusableRow(f"{where}: its text contains half a character (a lone surrogate)")

    def encode(self, row: dict, prompt: bool = False, responses_only: bool = False) -> Example:
        """Tokenise a row; with `prompt`, without its last assistant turn and ready to answer.

        Targets are all text tokens after a text token, or the assistant's alone, ends of turn
        included (task rows)."""
        self.check(row)
        where = row.get("where", f"row {row['id']}")
        messages = row["messages"]
        if prompt and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        messages = [{**m, "content": m["content"].replace("<image>", IMAGE)} for m in messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                  add_generation_prompt=prompt)
        if not prompt:
            text = text.rstrip("\n")
        ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False))
        grids = torch.tensor([self.grid(image, where) for image in row["images"]],
                             dtype=torch.long).view(-1, 3)
        of_image = ids == self.image_token                                  # (T,) bool
        positions = torch.arange(len(ids))[:, None].expand(-1, 3)           # (T, 3)
        if len(grids):
            repeats = torch.ones_like(ids)
            repeats[of_image] = grids.prod(-1) // self.merge ** 2
            ids = ids.repeat_interleave(repeats)
            of_image = ids == self.image_token
            positions, _ = self.rope_index(ids[None], mm_token_type_ids=of_image.int()[None],
                                           image_grid_thw=grids)
            positions = positions[:, 0].T
        if prompt and len(ids) > self.longest:
            raise UserError(f"{where}: has {len(ids)} tokens of {self.longest} at most; shorten it")
        index = (~torch.isin(ids, self.vision_ids)).nonzero()[:, 0]         # (M,) of text tokens
        predicts = torch.zeros(len(index), dtype=torch.bool)
        predicts[:-1] = index[1:] == index[:-1] + 1     # not after a vision token: it has no state
        if responses_only:
            predicts[:-1] &= self.of_responses(ids.tolist())[index[1:]]
        return Example(row["id"], where, ids, positions, index, ids[index], predicts,
                       of_image.cumsum(0)[index] > 0, row["images"], grids)

    def of_responses(self, ids: list[int]) -> Tensor:
        """Which tokens are the assistant's, the ends of its turns included: (T,) bool."""
        stops, answers, answering = self.stop_ids.tolist(), [], False
        for t, token in enumerate(ids):
            answers.append(answering)
            after_role = ids[max(0, t - len(self.turn)):t] == self.turn     # its newline
            answering = after_role or (answering and token not in stops)
        return torch.tensor(answers)

    def pixels(self, example: Example) -> Tensor:
        """(patches, 1176) of a row's images, decoded here and not before."""
        sizes = map(tuple, (example.grids[:, 1:] * self.processor.patch_size).tolist())
        pictures = [open_image(image, example.where, s) for image, s in zip(example.images, sizes)]
        return self.processor(images=pictures, do_resize=False, return_tensors="pt")["pixel_values"]

    def collate(self, examples: list[Example]) -> Batch:
        """B rows as one right-padded batch, their images decoded where no thread has done so."""
        pixels = [example.pixels.result() if example.pixels else self.pixels(example)
                  for example in examples if example.images]
        return Batch(examples, self.pad, torch.cat(pixels) if pixels else None)


decoders = ThreadPoolExecutor(4, "decode")              # of pictures; they do nothing else


class Stream:
    """Endless shuffled batches of one kind of rows, resumable at the exact batch.

    Each epoch shuffles all rows of all files by a seed of its own and cuts them into blocks of at
    most `block`; a block's rows are tokenised, grouped into batches of `batch_tokens` tokens with
    similar lengths together, and the batches shuffled. The cursor (block, batch in it) rebuilds
    everything. The global batch is the same for any number of ranks: each tokenises every world-th
    row of a block, and trains on those. The next batch's pictures are decoded meanwhile.
    """

    def __init__(self, rows: Rows, encoder: Encoder, batch_tokens: int, seed: int,
                 max_tokens: int = 2048, block: int = 2048, hold_out: int = 0,
                 responses_only: bool = False, pictures: bool | None = None, strict: bool = False):
        """hold_out: about so many first rows, of every file at most a tenth, are kept for reports;
        pictures: whether rows must have some, or None; strict: a row that cannot be used is an
        error, not left out (a task's own rows)."""
        self.rows, self.encoder, self.seed, self.strict = rows, encoder, seed, strict
        self.batch_tokens, self.max_tokens = batch_tokens, max_tokens
        self.responses_only, self.pictures = responses_only, pictures
        self.named, held, kept, end = set(), [], [], 0      # rows already named as left out
        for part in rows.parts:
            n = min(math.ceil(hold_out / len(rows.parts)), len(part) // 10)
            held.append(np.arange(end, end + n))
            kept.append(np.arange(end + n, end + len(part)))
            end += len(part)
        self.numbers = np.concatenate(kept)
        self.blocks = max(1, math.ceil(len(self.numbers) / block))         # of an epoch
        self.held_out = list(self.encode(np.concatenate(held))[0].values())
        self.load_state_dict({"block": 0, "batch": 0})

    def state_dict(self) -> dict:
        return dict(self.cursor)

    def load_state_dict(self, cursor: dict):
        self.cursor, self.ahead = dict(cursor), []
        self.batches = self.make_block(cursor["block"])

    def fit(self, row: dict) -> Example:
        """The row within `max_tokens`, cut at a message boundary; `UnusableRow` if there is none or
        nothing in it is to be predicted."""
        where, part = row.get("where", row["id"]), row
        while True:
            if self.pictures not in (None, bool(part["images"])):
                raise UnusableRow(f"{where}: {len(part['images'])} images within {self.max_tokens} "
                                  "tokens; --paired takes rows with, --text rows without")
            example = self.encoder.encode(part, responses_only=self.responses_only)
            if not example.predicts.any():
                raise UnusableRow(f"{where}: nothing in it is to be predicted (an empty answer?)")
            if len(example) <= self.max_tokens:
                return example
            messages = part["messages"][:-1]
            while messages and messages[-1]["role"] != "assistant":
                messages = messages[:-1]
            if not messages:
                raise UnusableRow(f"{where}: over {self.max_tokens} tokens up to its first answer")
            shown = sum(m["content"].count("<image>") for m in messages)
            part = {**row, "messages": messages, "images": row["images"][:shown]}

    def encode(self, numbers) -> tuple[dict[int, Example], dict[int, str]]:
        """Those of these rows that can be used, by number, and why the others cannot."""
        examples, left_out = {}, {}
        for n in numbers.tolist():
            try:
                examples[n] = self.fit(self.rows[n])
            except UnusableRow as error:
                if self.strict:
                    raise
                left_out[n] = str(error)
        return examples, left_out

    def make_block(self, block: int) -> list[list[Example]]:
        """This rank's examples of each batch of a block."""
        epoch, part = divmod(block, self.blocks)
        rng = np.random.default_rng(key_seed(self.seed, epoch))
        numbers = np.array_split(rng.permutation(self.numbers), self.blocks)[part]
        examples, left_out = self.encode(numbers[rank()::world_size()])
        lengths = gather({n: len(example) for n, example in examples.items()})
        left_out = gather(left_out)
        new = [left_out[n] for n in sorted(left_out.keys() - self.named)]
        self.named |= left_out.keys()
        if new:
            say(f"note: {len(new)} rows left out: {'; '.join(new[:3])}")
        if not lengths:
            raise UserError(f"{self.rows.sources!s:.300}: not one row of {len(numbers)} can be "
                            f"trained on: {'; '.join(new[:1])}")
        # Similar lengths together, else in random order; then the batches in random order.
        rng, batches, total = random.Random(key_seed(self.seed, block)), [], 0
        order = sorted(lengths)
        rng.shuffle(order)
        for n in sorted(order, key=lambda n: lengths[n] // 32):
            if not batches or total + lengths[n] > self.batch_tokens:
                batches.append([])
                total = 0
            batches[-1].append(n)
            total += lengths[n]
        rng.shuffle(batches)
        return [[examples[n] for n in batch if n in examples] for batch in batches]

    def decoding(self) -> list[Example]:
        """The examples of the cursor's batch, their pictures handed to `decoders`; none after a
        block's last batch."""
        batch = []
        for example in (self.batches + [[]])[self.cursor["batch"]]:
            if example.images:
                example = replace(example, pixels=decoders.submit(self.encoder.pixels, example))
            batch.append(example)
        return batch

    def next(self) -> list[Example]:
        """This rank's examples of the next global batch (may be none on a small batch)."""
        if self.cursor["batch"] == len(self.batches):
            self.load_state_dict({"block": self.cursor["block"] + 1, "batch": 0})
        examples = self.ahead or self.decoding()
        self.cursor["batch"] += 1
        self.ahead = self.decoding()
        return examples


# ---- Optimisation ----------------------------------------------------------------------------


def micro_batches(agent: Agent, examples: list[Example], tokens_at_once: int):
    """Rows in batches by padded size, the longest together; the split changes no gradient."""
    rows = sorted(examples, key=len, reverse=True)
    for part in pack(rows, 1, 0, tokens_at_once):
        yield agent.encoder.collate([rows[i] for i in part]).to(agent.device)


def next_batches(agent: Agent, streams: dict[str, Stream], kinds,
                 tokens_at_once: int) -> tuple[list[Batch], list[str]]:
    """This rank's micro-batches of the next global batch of each kind, and their rows' ids."""
    batches, row_ids = [], []
    for kind in kinds:
        if kind in streams:
            examples = streams[kind].next()
            row_ids += [example.id for example in examples]
            batches += micro_batches(agent, examples, tokens_at_once)
    return batches, row_ids


def token_counts(masks: dict[str, list[Tensor]]) -> dict[str, float]:
    """How many positions these bool masks mark by name, over all micro-batches and ranks, at least
    1: the denominators of losses."""
    marked = {name: sum(map(torch.sum, parts)) for name, parts in masks.items()}
    return {name: max(1.0, n) for name, n in all_sum(marked).items()}


def cosine(step: int, steps: int, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Learning-rate factor at `step`: linear warm-up over a share of the steps, cosine decay."""
    rise = max(1, int(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    share = (step - rise) / max(1, steps - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def reduce_gradients(params: list[nn.Parameter]):
    """Sum gradients over ranks, a tensor at a time. Every loss is already divided by its global
    denominator, so any split over ranks and micro-batches gives the same sum; a rank without rows
    adds zeros."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if dist.is_initialized():
        for work in [dist.all_reduce(p.grad, async_op=True) for p in params]:
            work.wait()


def optimizer_step(run: Run, optimizers: list[torch.optim.Optimizer], lrs: list[float],
                   row_ids: list[str]) -> float:
    """Reduce gradients, clip each optimiser's to norm 1, step; returns the largest norm.

    A non-finite norm skips the step on all ranks; ten in a row raise `UserError` naming rows.
    """
    norms = []
    for optimizer, lr in zip(optimizers, lrs, strict=True):
        params = []
        for group in optimizer.param_groups:
            group["lr"] = lr
            params += group["params"]
        reduce_gradients(params)
        norms.append(nn.utils.clip_grad_norm_(params, 1.0))
    norm = torch.stack(norms).max().item()
    if math.isfinite(norm):
        run.skipped_in_a_row = 0
        for optimizer in optimizers:
            optimizer.step()
    else:
        run.skipped += 1
        run.skipped_in_a_row += 1
        say(f"warning: non-finite gradient, step skipped ({run.skipped_in_a_row} in a row)")
    if run.skipped_in_a_row == 10:
        raise UserError(f"{run.folder}: ten non-finite steps, now on {row_ids[:8]}; lower --lr")
    for optimizer in optimizers:
        optimizer.zero_grad()
    return norm


# ---- Ranks -----------------------------------------------------------------------------------


def launch(main):
    """Run `main` on the command line. A mistake outside the code, a file that cannot be read or
    written included, ends with one line and status 2; what was computed is in the checkpoints."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")        # a terminal may lack a character
    status = 0
    try:
        main(sys.argv[1:])
    except BrokenPipeError:                         # `| head` has seen enough
        status = 141
    except (UserError, OSError) as error:
        status = getattr(error, "status", 2)     # an OSError has none
        remedy = "" if isinstance(error, UserError) else "; check the path, space and permissions"
        line = " ".join(f"{error}{remedy}".split())
        if len(line) > 1200:
            line = f"{line[:800]} ... {line[-300:]}"
        tqdm.write(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        tqdm.write("interrupted: the same command goes on from its checkpoint", file=sys.stderr)
    if status:
        os._exit(status)        # at once: no wait for calls of the judge or for other ranks
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(args) -> str:
    return "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"


def init_distributed(args):
    """Join torchrun's process group if there is one: nccl on CUDA, gloo on CPU."""
    cuda = device_of(args) == "cuda"
    if args.device == "cuda" and not cuda:
        raise UserError("--device cuda: no CUDA device is visible; use --device cpu")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" not in os.environ or dist.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ:
        raise UserError("RANK is set and MASTER_ADDR is not: start with torchrun, or unset RANK")
    threading.Thread(target=end_with_parent, daemon=True).start()
    # Small counts and the judge's results travel on CPU; a slow judge must not look hung. A store
    # of its own per attempt: after torchrun's --max-restarts the last one's addresses of dead
    # workers are still in the agent's.
    hours = datetime.timedelta(hours=6)
    store, own_rank, size = next(dist.rendezvous("env://", timeout=hours))
    store = dist.PrefixStore(f"kit {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=own_rank,
                            world_size=size, timeout=hours)


def end_with_parent():
    """A worker whose torchrun is gone ends too, so that a second start does not meet it."""
    while os.getppid() == PARENT:
        time.sleep(1)
    os._exit(1)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def say(*words, sep: str = " "):
    """Print once, from rank 0."""
    if rank() == 0:
        print(*words, sep=sep, flush=True)


def gather(part: dict) -> dict:
    """The union of every rank's dict, on all ranks."""
    if not dist.is_initialized():
        return part
    parts = [None] * world_size()
    dist.all_gather_object(parts, part)
    return reduce(dict.__or__, parts)


def all_sum(figures: dict) -> dict:
    """Sums over all ranks of scalars and tensors by name, in float64 so that no count is rounded:
    floats for what is scalar, tensors on the CPU for the rest."""
    local = {name: torch.as_tensor(value, dtype=torch.double, device="cpu").detach()
             for name, value in figures.items()}
    parts, sums = gather({rank(): local}).values(), {}
    for name in local:
        total = sum(part[name] for part in parts)
        sums[name] = total if total.dim() else total.item()
    return sums


def agreed(value):
    """Rank 0's value on all ranks, of what another process may change between two looks."""
    return gather({rank(): value})[0]


def peak_memory() -> int:
    """Peak bytes: of the CUDA allocator once it is used, else of the process's resident set."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- Flags -----------------------------------------------------------------------------------

# What a flag leaves open (None) is filled from these and from the script's DEFAULTS.
STRUCTURE = {"tiny": {"codes": 3, "idm_layers": 2, "policy_layers": 2, "image_tokens": 4},
             "full": {"codes": 128, "idm_layers": 4, "policy_layers": 8, "image_tokens": 256}}
STRUCTURAL = (*STRUCTURE["tiny"], "without")        # a model's size and ablations
# Where things lie, how they run, what is evaluated: these change no weight, so a run goes on
# whatever they are. Data are compared by their files' names and sizes, the model by its weights.
SURROUNDINGS = ("model", "paired", "text", "image_root", "task", "task_root", "run_root", "device",
                "tokens_at_once", "recompute", "eval_prompts")
NOT_COMPARED = (*SURROUNDINGS, "name", "parent", "fresh", "splits", "judge_url")
# What a stage hands to the one before it, as far as that one takes it: never --lr or --steps.
HANDED_DOWN = (*SURROUNDINGS, "seed", "dtype", *STRUCTURAL)


def count(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)


def make_parser(doc: str, defaults: dict) -> argparse.ArgumentParser:
    """A parser with the flags that all training scripts share; --help ends with `defaults`, the
    script's table of kind -> "tiny" or "full" -> flag -> value."""
    table = {}
    for kind, scales in defaults.items():
        for scale, values in scales.items():
            table[f"{kind} {scale}"] = {**STRUCTURE[scale], **values}
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]", description=doc, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=format_table("defaults (full: any --model but tiny)", table))
    add = parser.add_argument_group("model, data and run").add_argument
    add("--model", default="tiny", help="`tiny` (embedded), a Qwen2.5-VL folder or a hub id")
    add("--paired", type=os.path.abspath, nargs="+", metavar="FILE", help="dialogues with images")
    add("--text", type=os.path.abspath, nargs="+", metavar="FILE", help="dialogues without images")
    add("--image-root", type=os.path.abspath, help="of relative image paths; else the row's file")
    add("--run-root", default="runs", help="where run folders are kept (default: runs)")
    add("--name", default="", help="suffix of this run's folder, for variants")
    add("--parent", help="run folder to start from instead of the usual predecessor")
    add("--seed", type=int, default=0, help="of data order, noise, initial weights (default: 0)")
    add("--steps", type=int, help="optimiser steps; 0: the start, to be evaluated")
    add("--lr", type=positive, help="peak learning rate")
    if "batch_tokens" in next(iter(table.values())):        # RL counts prompts instead
        add("--batch-tokens", type=count, help="a step over all ranks, of each kind of rows")
    add("--tokens-at-once", type=count, default=16384, help="micro-batch budget: bounds memory, "
        "changes no gradient; one row or one prompt's answers at least (default: 16384)")
    add("--recompute", action="store_true", help="compute layers again: less memory, more time")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the backbone")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--fresh", action="store_true", help="delete this run's folder and start it again")
    add = parser.add_argument_group("structure and ablations: folders of their own").add_argument
    add("--codes", type=count, help="|C|, size of the codebook")
    add("--idm-layers", type=count, help="layers of the inverse dynamics model")
    add("--policy-layers", type=count, help="layers of the policy")
    add("--image-tokens", type=count, help="most tokens an image may have, its shape kept")
    add("--without", action="extend", nargs="+", default=[],
        choices=("text", "projector", "cycle", "codebook"),
        help="text-only rows; the projector (their states are e^T itself); the cycle loss on them; "
        "the codebook (action j is the j-th likeliest token)")
    return parser


def scale_of(model: str) -> str:
    return "tiny" if model == "tiny" else "full"


def physical_cores() -> int:
    """Cores of this machine, two threads of one counted once where Linux names them."""
    siblings = Path("/sys/devices/system/cpu").glob("cpu*/topology/thread_siblings_list")
    return len({file.read_text() for file in siblings}) or os.cpu_count()


def set_threads(model: str, most: int = 2):
    """For `tiny` at most two threads, each on a core of its own, unless the user has set
    OMP_NUM_THREADS: its products are so small that more of them, or two on one core, lose time."""
    if model == "tiny" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(most, physical_cores()))


def fill(args: argparse.Namespace, defaults: dict) -> argparse.Namespace:
    """Fill what is left open from STRUCTURE and `defaults`, one kind of a script's DEFAULTS, and
    join the process group."""
    scale = scale_of(args.model)
    if scale == "full" and os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)
    for name, value in {**STRUCTURE[scale], **defaults[scale]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.without = sorted(set(args.without))
    set_threads(args.model)
    init_distributed(args)
    return args


# ---- Predecessors and run folders ------------------------------------------------------------


def model_root(args) -> Path:
    """runs/<model>: a hub id or path becomes one folder name."""
    return Path(args.run_root) / args.model.strip("/.").replace("/", "--")


def folder_of(args, stage: str, name: str = "") -> Path:
    """A stage's folder: its suffixes say what changes its result, so ablations never collide;
    `name` is this run's own suffix, which predecessors do not carry."""
    parts = [stage]
    for key, usual in STRUCTURE[scale_of(args.model)].items():
        if getattr(args, key) != usual:
            parts.append(f"{key.split('_')[0]}{getattr(args, key)}")
    if args.without:
        parts += ["without", *args.without]
    if name:
        parts.append(name)
    return model_root(args) / "-".join(parts)


def differing(had: dict, now: dict, keys) -> str:
    """Which of these keys differ, as "key: value -> value"; empty if none does."""
    changed = [key for key in sorted(keys) if had.get(key) != now.get(key)]
    return ", ".join(f"{key}: {had.get(key)} -> {now.get(key)}" for key in changed)


def predecessor(args, data: dict, stage: str, module, *flags: str) -> Path:
    """The finished run of `stage` that this one starts from: as it stands, run first (`tiny`), or
    an error that prints its command. It must have this run's structure, ablations and data;
    its steps, learning rate and seed are its own, and with --parent its task."""
    folder, script = Path(args.parent or folder_of(args, stage)), Path(module.__file__).name
    if agreed((folder / "model.safetensors").exists()):
        config = read_config(folder)
        compared = {*STRUCTURAL} | config["data"].keys() & data.keys()
        if args.parent:
            compared.discard("task")
        had, now = config["args"] | config["data"], vars(args) | data
        if different := differing(had, now, compared):
            raise UserError(f"{folder} differs ({different}); run {script} with --fresh, or take "
                            "another --run-root")
        return folder
    if args.parent:
        raise UserError(f"--parent {folder}: no finished run there (model.safetensors)")
    usual = vars(module.arguments().parse_args(flags)) | STRUCTURE[scale_of(args.model)]
    argv = list(flags)
    for name in HANDED_DOWN:
        value = getattr(args, name, None)
        if name in usual and value != usual[name]:
            argv.append("--" + name.replace("_", "-"))
            if value is not True:
                argv += value if isinstance(value, list) else [str(value)]
    if args.model != "tiny":
        raise UserError(f"{folder} is missing; run first: {shlex.join(['python', script, *argv])}")
    say(f"{folder} is missing or unfinished: running {script} first")
    module.main(argv)
    return folder


def file_hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_config(folder) -> dict:
    """A run folder's config.json; `UserError` if it is no run folder or a damaged one."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        if not {"args", "data", "base", "space", "parent", "sha256"} <= config.keys():
            raise ValueError("it is no config of a run")
        return config
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: config.json: {error}; name a run folder or --fresh") from None


def fsync(path: Path):
    """Wait until a file's content is on disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def atomic(path: Path, write):
    """`write(temporary)`, flush to disk, rename: the file is whole or it is not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        fsync(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:   # torch's and safetensors' own
        with contextlib.suppress(OSError):          # where nothing can be written or removed
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error!r:.90}); check space and permissions, "
                        "then run the same command: earlier files are intact") from None


def write_text(path: Path, text: str):
    """`atomic`, of a text in UTF-8."""
    atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def lock(folder: Path):
    """Hold folder/state/lock until the process ends, however it ends."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    file = open(folder / "state" / "lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process has this run; wait, or take --name") from None
    return file


def trained(thing) -> dict:
    """The parameters of a module that train, or the state of anything else that has one. (No module
    here has a buffer that belongs to its state.)"""
    if not isinstance(thing, nn.Module):
        return thing.state_dict()
    return {name: p.detach() for name, p in thing.named_parameters() if p.requires_grad}


SAVE_SECONDS = 60            # between checkpoints


class Run:
    """One run's folder: config.json, log.jsonl, samples.jsonl, state/, model.safetensors.

    The folder is finished when model.safetensors stands in it. All randomness of the training
    loops is keyed by seed, step and row, so the state to go on from is weights, optimisers, the
    step and the data cursors: no generator state.
    """

    def __init__(self, args, folder: Path, agent: Agent, data: dict, parent: Path | None = None):
        """Open the folder: start it, go on with it, or find it finished. Raises `UserError` if it
        was started with other arguments, data, base or parent, or if another process has it.
        `data` is what runs that start from this one must share (`train_projector.data_of`)."""
        self.folder, self.steps, self.started = Path(folder), args.steps, time.time()
        self.skipped = self.skipped_in_a_row = 0        # steps with a non-finite gradient
        self.tables = {}                                # of report.json
        weights = self.folder / "model.safetensors"
        if rank() == 0 and (args.fresh or not weights.exists()):
            self.lock = lock(self.folder)               # never under another process's feet
            if args.fresh:
                shutil.rmtree(self.folder)
                self.lock = lock(self.folder)
        self.finished = agreed(weights.exists())        # as rank 0 has left it: the others wait
        self.config = {
            "args": {**vars(args), "dtype": str(agent.dtype).removeprefix("torch.")},
            "data": data, "base": agent.base_hash, "space": agent.space,
            "parent": parent and os.path.relpath(parent, self.folder),
            "parent_sha256": parent and read_config(parent)["sha256"],
            "sha256": None, "world_size": world_size(), "argv": sys.argv,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
        if self.finished or (self.folder / "state" / "last.pt").exists():
            had, now = self.shared(read_config(self.folder)), self.shared(self.config)
            if different := differing(had, now, had.keys() | now.keys()):
                raise UserError(f"{self.folder} differs ({different}); --name a variant or --fresh")
        if self.finished:
            say(f"{self.folder} is finished, its tables are in report.json (--fresh redoes it)")
        elif rank() == 0:
            self.write_config()

    @staticmethod
    def shared(config: dict) -> dict:
        """What the two configs of a run that goes on must share."""
        args = {name: value for name, value in config["args"].items() if name not in NOT_COMPARED}
        args |= config["data"] | {name: config[name] for name in ("base", "parent_sha256")}
        return json.loads(json.dumps(args))             # tuples as lists

    def write_config(self):
        write_text(self.folder / "config.json", json.dumps(self.config, indent=1))

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.jsonl"))

    def resume(self, state: dict) -> int:
        """Restore `state` (name -> whatever has state_dict and load_state_dict) from the last
        checkpoint and cut the logs back to it; the step to go on with."""
        path, saved = self.folder / "state" / "last.pt", {"step": 0, "logs": {}}
        if path.exists():
            try:
                if zipfile.ZipFile(path).testzip():     # torch does not look at checksums
                    raise ValueError("checksum")
                saved = torch.load(path, map_location="cpu", weights_only=True)
                for name, thing in state.items():
                    thing.load_state_dict({**thing.state_dict(), **saved["state"][name]})
                self.skipped, self.skipped_in_a_row = saved["skipped"]
            except Exception as error:
                raise UserError(f"{path}: is not a checkpoint ({error!r:.60}); remove it") from None
            say(f"continuing {self.folder} at step {saved['step']}")
        steps = set(gather({rank(): saved["step"]}).values())
        if len(steps) > 1:
            raise UserError(f"{self.folder}: ranks see steps {sorted(steps)}; share the --run-root")
        if rank() == 0:
            for file in self.logs():
                os.truncate(file, min(file.stat().st_size, saved["logs"].get(file.name, 0)))
        barrier()
        self.bar = tqdm(total=self.steps, initial=saved["step"], desc=self.folder.name,
                        disable=rank() != 0 or saved["step"] == self.steps, mininterval=1.0)
        self.began = self.saved = time.time()
        return saved["step"]

    def log(self, step: int, figures: dict, *shown: str):
        """Append one step's row to log.jsonl (rank 0), numbers rounded to 7 digits, with the
        step's seconds and the peak memory; the figures named in `shown` go to the bar."""
        row = {"step": step, **figures, "skipped": self.skipped,
               "seconds": time.time() - self.began, "peak_memory": peak_memory()}
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = float(f"{value:.7g}") if math.isfinite(value) else None
        self.began = time.time()
        self.append("log.jsonl", [row])
        self.bar.set_postfix({name: row[name] for name in shown}, refresh=False)
        self.bar.update()

    def append(self, name: str, rows: list[dict]):
        """Append rows to log.jsonl or samples.jsonl (rank 0)."""
        if rank() == 0:
            with open(self.folder / name, "a") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def save(self, step: int, state: dict):
        """Atomic checkpoint of `state` after `step` steps, about once a minute and after the
        last."""
        if rank() == 0 and (step == self.steps or time.time() - self.saved >= SAVE_SECONDS):
            for file in self.logs():                    # on disk before what counts them is
                fsync(file)
            saved = {"step": step, "skipped": [self.skipped, self.skipped_in_a_row],
                     "state": {name: trained(thing) for name, thing in state.items()},
                     "logs": {file.name: file.stat().st_size for file in self.logs()}}
            atomic(self.folder / "state" / "last.pt", lambda path: torch.save(saved, path))
            self.saved = time.time()
        if step == self.steps:
            self.bar.close()

    def report(self, title: str, table: dict[str, dict]):
        """Print a table (rows x columns) and keep it in report.json: the stage's own findings."""
        say(format_table(title, table))
        self.tables[title] = table
        if rank() == 0:
            write_text(self.folder / "report.json", json.dumps(self.tables, indent=1))

    def finish(self, **modules: nn.Module):
        """Write model.safetensors (only what this stage trained), its hash first, drop state/."""
        weights = trained(nn.ModuleDict(modules))
        tensors = {name: value.cpu().contiguous() for name, value in weights.items()}

        def write(path):
            save_file(tensors, path)
            shutil.copymode(self.folder / "config.json", path)      # safetensors' own is 0600
            self.config["sha256"] = file_hash(path)
            self.write_config()
        if rank() == 0:
            atomic(self.folder / "model.safetensors", write)
            shutil.rmtree(self.folder / "state", ignore_errors=True)
        barrier()
        say(f"{self.folder} finished in {(time.time() - self.started) / 60:.1f} min")


def table_cells(title: str, table: dict[str, dict]) -> list[list[str]]:
    """A table's lines of cells; columns are the union of the rows' keys, numbers to 4 digits."""
    columns = {}
    for row in table.values():
        columns |= dict.fromkeys(row)
    lines = [[title, *columns]]
    for name, row in table.items():
        line = [name]
        for column in columns:
            value = row.get(column, "")
            line.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        lines.append(line)
    return lines


def format_table(title: str, table: dict[str, dict]) -> str:
    """`table_cells` as plain text."""
    lines, text = table_cells(title, table), []
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *cells in lines:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        text.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(text)
