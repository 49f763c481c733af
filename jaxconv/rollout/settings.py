"""What a self-play config may be: refused before any work, in one line that names the field."""

from jaxconv import envs
from jaxconv.errors import Refused
from jaxconv.models.config import EXECUTION
from jaxconv.models.device_group import refuse_uneven
from jaxconv.objectives.advantages import check_pair
from jaxconv.objectives.ppo import PPOCoefficients
from jaxconv.rollout.quality import QualityRules
from jaxconv.rollout.world import engine_shape, make_env
from jaxconv.train import checks
from jaxconv.train.mesh import check_section
from jaxconv.train.optimizer import OPTIMIZERS, SCHEDULES
from jaxconv.train.ppo import Credit, Minibatching
from jaxconv.train.profiling import parse_steps
from jaxconv.train.starting_point import small_decoder
from jaxconv.train.trainable import lora_config

AT_LEAST = {
    "seed": 0,
    "warm_start.dialogues": 1,
    "warm_start.held_out": 1,
    "warm_start.steps": 0,
    "warm_start.streams": 1,
    "warm_start.evaluate_every": 1,
    "warm_start.rows": 1,
    "rollout.slots": 1,
    "rollout.engines": 1,
    "rollout.tensor": 1,
    "rollout.lengths": 1,
    "rollout.burst": 1,
    "rollout.prefill_rows": 1,
    "rollout.prefill_tokens": 1,
    "rollout.turn_budget": 1,
    "self_play.iterations": 0,
    "self_play.games": 1,
    "self_play.warmup": 0,
    "self_play.critic_warmup": 0,
    "self_play.weight_decay": 0,
    "self_play.invalid_penalty": 0,
    "warm_start.warmup": 0,
    "warm_start.weight_decay": 0,
    "warm_start.value_gradient": 0,
    "model.vocab_size": 261,
    "model.embed_dim": 1,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.mlp_dim": 1,
    "minibatching.epochs": 1,
    "minibatching.minibatches": 1,
    "minibatching.rows": 1,
    "minibatching.capacity": 1,
    "quality.repeated_ngram": 1,
    "quality.repeats": 2,
    "checkpoint.every": 1,
    "checkpoint.warm_start_every": 1,
    "checkpoint.keep": 1,
}
"""The least value of fields that count something."""

POSITIVE = (
    "checkpoint.rollout_seconds",
    "alarm.entropy_high",
    "rollout.temperature",
    "arena.sharp_temperature",
    "warm_start.learning_rate",
    "warm_start.clip_norm",
    "self_play.learning_rate",
    "self_play.clip_norm",
)
FRACTIONS = (
    "alarm.entropy_low",
    "alarm.truncated_high",
    "self_play.script_share",
    "self_play.value_gradient",
    "credit.gamma_turn",
    "credit.lam_turn",
    "credit.gamma_token",
    "credit.lam_token",
)


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    _training, _held_out = envs.temperaments(config.env.name)
    checks.at_least(config, AT_LEAST)
    checks.fractions(config, FRACTIONS)
    checks.below_one(config, ("warm_start.b2", "self_play.b2"))
    checks.positive(config, POSITIVE)
    if config.model.embed_dim % (2 * config.model.num_heads):
        raise Refused(
            f"config.model.num_heads={config.model.num_heads}; "
            f"it must divide half of config.model.embed_dim={config.model.embed_dim}"
        )
    if config.self_play.games < config.minibatching.minibatches:
        raise Refused(
            f"config.minibatching.minibatches={config.minibatching.minibatches}; it must be at "
            f"most config.self_play.games={config.self_play.games}"
        )
    if config.rollout.slots * config.rollout.engines < 2:
        raise Refused("config.rollout.slots=1 with .engines=1; a conversation needs two slots")
    checks.one_of(config, {"self_play.schedule": SCHEDULES})
    check_section(config)
    checks.one_of(config, {f"{s}.optimizer": OPTIMIZERS for s in ("warm_start", "self_play")})
    checks.naming("config.env.", lambda: make_env(config))
    if config.model.path:
        checks.one_of(config, {f"model.{name}": known for name, known in EXECUTION.items()})
    else:
        positions = config.rollout.lengths[-1]
        small = checks.naming("config.model.", lambda: small_decoder(config, positions))
        refuse_uneven(small, config.rollout.tensor)
    checks.at_least(config, {"lora.rank": 0})
    checks.naming("config.lora: ", lambda: lora_config(config))
    if config.lora.dropout:
        raise Refused(
            f"config.lora.dropout={config.lora.dropout}; self-play needs 0, because what is "
            "trained must be what has spoken"
        )
    ppo_parts(config)
    QualityRules(**config.quality)
    parse_steps(config.profile.steps)
    shape = checks.naming("config.", lambda: engine_shape(config))
    if config.rollout.turn_budget >= shape.lengths[-1]:
        raise Refused(
            f"config.rollout.turn_budget={config.rollout.turn_budget}; "
            f"it must be below the cache length, {shape.lengths[-1]}"
        )
    for width in ("warm_start", "minibatching"):
        if config[width].width < shape.lengths[-1]:
            raise Refused(
                f"config.{width}.width={config[width].width}; a row must hold a whole stream, "
                f"config.rollout.lengths[-1]={shape.lengths[-1]}"
            )
    a = config.arena
    if a.games < 2:
        raise Refused(f"config.arena.games={a.games}; it must be at least 2")
    if not 2 <= a.script_games <= a.games:
        raise Refused(
            f"config.arena.script_games={a.script_games}; it must be from 2 to "
            f"config.arena.games={a.games}"
        )


def ppo_parts(config) -> tuple[PPOCoefficients, Credit, Minibatching]:
    """The parts of a PPO update. Raises Refused, naming the section, for values that cannot be."""
    section = "loss"
    try:
        coefficients = PPOCoefficients(**config.loss)
        section = "credit"
        check_pair(config.credit.anchor, config.credit.deposit)
        return coefficients, Credit(**config.credit), Minibatching(**config.minibatching)
    except ValueError as error:
        raise Refused(f"config.{section}.{error}") from None
