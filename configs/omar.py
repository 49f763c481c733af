"""OMAR: one model plays every role of a conversation and learns from its end (arXiv 2602.03109).

tiny      a 0.14 M-parameter model from scratch on two-player bargaining: minutes on a laptop CPU.
league    the same with two and three players, longer, then a round robin with every script.
bargaining_qwen2.5_0.5b    a real model that reads the rules in its brief; one accelerator of 24 GB.
bargaining_qwen2.5_7b_lora an adapter on 7 B: about 30 GiB, and 15 GiB for the rollout's copy.
bargaining_qwen2.5_7b, bargaining_qwen3_4b, bargaining_llama3.1_8b, bargaining_llama3.1_70b
          all weights of a checkpoint, split over a slice, and engines over the chips of a host:
          docs/topologies.md says which slice.
"""

from ml_collections import ConfigDict

from jaxconv.train.sections import checkpoint, lora_section, mesh_section, model_section

PRESETS = (
    "tiny",
    "league",
    "bargaining_qwen2.5_0.5b",
    "bargaining_qwen2.5_7b",
    "bargaining_qwen2.5_7b_lora",
    "bargaining_qwen3_4b",
    "bargaining_llama3.1_8b",
    "bargaining_llama3.1_70b",
)


def get_config(preset: str = "tiny") -> ConfigDict:
    config = ConfigDict()
    config.recipe = "omar"
    config.seed = 0

    config.env = ConfigDict()
    config.env.name = "bargaining"
    config.env.players = (2,)  # how many agents an episode may have
    config.env.kinds = ("division",)  # of "division", "terms"
    config.env.turns = (3, 5)  # fewest and most turns of an agent; the end is hidden
    config.env.rules = False  # whether briefs explain the game, for models that have not seen it
    config.env.weights = ConfigDict()  # of the seven range-normalised dimensions in the reward
    for dimension in (
        "believability",
        "relationship",
        "knowledge",
        "secret",
        "social_rules",
        "financial_and_material_benefits",
        "goal",
    ):
        config.env.weights[dimension] = 1.0

    config.model = model_section(vocab_size=512, num_heads=2)
    config.lora = lora_section()
    config.mesh = mesh_section()

    config.warm_start = ConfigDict()  # imitation of the scripted players
    config.warm_start.dialogues = 6000
    config.warm_start.held_out = 256  # further dialogues, for the held-out loss
    config.warm_start.steps = 800
    config.warm_start.streams = 64  # of one agent each, a step
    config.warm_start.optimizer = "adamw"  # or "adafactor", "muon"
    config.warm_start.learning_rate = 4e-3
    config.warm_start.warmup = 50
    config.warm_start.b2 = 0.95
    config.warm_start.weight_decay = 0.01
    config.warm_start.clip_norm = 1.0
    config.warm_start.value_gradient = 5.0  # factor on the critic's gradient into the trunk
    config.warm_start.evaluate_every = 200
    config.warm_start.width = 256  # tokens of a packed row
    config.warm_start.rows = 8  # packed rows of a micro-batch

    config.rollout = ConfigDict()
    config.rollout.slots = 24  # of one engine
    config.rollout.engines = 4  # of one policy; agents of one game sit in different ones
    config.rollout.tensor = 1  # devices that one engine spans, each with some of the heads
    config.rollout.lengths = (128, 256)  # cache lengths; the last is where a stream ends
    config.rollout.burst = 32  # most tokens of one dispatch
    config.rollout.leave = 0.75  # a burst leaves early when this share of its turns has ended
    config.rollout.turn_budget = 40  # most tokens of a turn
    config.rollout.prefill_rows = (6, 24)
    config.rollout.prefill_tokens = (16, 64)
    config.rollout.temperature = 1.0  # the trainer judges tokens at the same temperature

    config.self_play = ConfigDict()
    config.self_play.iterations = 24
    config.self_play.games = 256  # an iteration
    config.self_play.script_share = 0.25  # of the games: one seat learns, scripts play the others
    config.self_play.optimizer = "adamw"  # or "adafactor", "muon"
    config.self_play.learning_rate = 5e-4
    config.self_play.schedule = "constant"  # or "cosine" (to a tenth), "linear" (to 0)
    config.self_play.warmup = 0
    config.self_play.b2 = 0.99
    config.self_play.weight_decay = 0.0
    config.self_play.clip_norm = 0.5
    config.self_play.critic_warmup = 1  # iterations that train the critic's head alone
    config.self_play.value_gradient = 0.1  # factor on the critic's gradient into the trunk
    config.self_play.invalid_penalty = 0.05  # taken from the reward of a turn nobody understands

    config.credit = ConfigDict()
    config.credit.estimator = "hierarchical"  # or "token": plain GAE, which knows no turns
    config.credit.gamma_turn = 1.0
    config.credit.lam_turn = 0.95
    config.credit.gamma_token = 1.0
    config.credit.lam_token = 1.0
    config.credit.anchor = "first"  # "first" or "last" action token of a turn
    config.credit.deposit = "return"  # "return", or "seed" with anchor "last"
    config.credit.whitening = "whiten"  # "whiten", "center" or "none", per team
    config.credit.importance_cap = 2.0
    config.credit.reward_kl = 0.0  # KL to the warm start in the reward, per nat
    config.credit.flagged = 0.0  # advantage of turns that the quality filter flags

    config.loss = ConfigDict()
    config.loss.clip_low = 0.2
    config.loss.clip_high = 0.28
    config.loss.value_clip = 0.2  # of the critic's step; 0 is off
    config.loss.value_coef = 0.5
    config.loss.entropy_coef = 0.003
    config.loss.kl_coef = 0.02  # KL to the warm start in the loss, per nat
    config.loss.dual_clip = 0.0  # bounds the loss of unlikely bad tokens at c > 1; 0 is off

    config.minibatching = ConfigDict()
    config.minibatching.epochs = 2
    config.minibatching.minibatches = 2
    config.minibatching.rows = 8
    config.minibatching.width = 256
    config.minibatching.capacity = 8

    config.quality = ConfigDict()  # of a turn; see credit.flagged
    config.quality.repeated_ngram = 3
    config.quality.repeats = 3
    config.quality.min_logprob = -4.0

    config.alarm = ConfigDict()  # self-play stops early when one of these is crossed
    config.alarm.entropy_high = 2.0  # times the entropy of the first iteration
    config.alarm.entropy_low = 0.2
    config.alarm.truncated_high = 0.1  # share of games that outgrow the cache
    config.alarm.reward_std_low = 0.005  # over the streams of an iteration, for three in a row

    config.arena = ConfigDict()
    config.arena.games = 512  # per pairing and seat; the same seeds everywhere
    config.arena.script_games = 128  # per script and seat
    config.arena.sharp_temperature = 0.5  # of the frozen model in the sampling control
    config.arena.league = False  # a round robin of everybody

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1  # self-play iterations
    config.checkpoint.warm_start_every = 100  # steps
    config.checkpoint.rollout_seconds = 600.0  # a long rollout is saved in the middle this often
    config.checkpoint.keep = 2

    config.profile = ConfigDict()
    config.profile.steps = ""  # "10:12" traces self-play iterations 10 and 11

    if preset == "league":
        config.env.players = (2, 3)
        config.rollout.lengths = (192, 320, 448)  # three players hear more
        config.warm_start.width = config.minibatching.width = 448
        config.warm_start.steps = 2000
        config.warm_start.rows = config.minibatching.rows = 4
        config.self_play.iterations = 150
        config.self_play.script_share = 0.5
        config.self_play.learning_rate = 7e-4
        config.self_play.schedule = "cosine"
        config.loss.kl_coef = 0.01
        config.arena.script_games = 96
        config.arena.league = True
    elif preset.startswith("bargaining_"):
        name = preset.removeprefix("bargaining_")
        checkpoint(config, name.removesuffix("_lora"))
        config.env.kinds = ("division", "terms")
        config.env.rules = True
        config.warm_start.steps = 100
        config.warm_start.learning_rate = 5e-6
        config.warm_start.rows = config.minibatching.rows = 8
        config.warm_start.width = config.minibatching.width = 2048
        config.rollout.lengths = (512, 1024, 2048)
        config.rollout.prefill_tokens = (64, 256)
        config.rollout.turn_budget = 96
        config.self_play.iterations = 200
        config.self_play.learning_rate = 1e-6
        config.self_play.clip_norm = 1.0
        config.checkpoint.every = 10
        if name in ("qwen2.5_7b", "qwen3_4b", "llama3.1_8b", "llama3.1_70b"):
            large = name == "llama3.1_70b"
            config.mesh.strategy = "fsdp"
            config.warm_start.rows = config.minibatching.rows = 128 if large else 32
            config.minibatching.capacity = 2 if large else 1
            config.rollout.tensor = 4  # the chips of a host
            config.rollout.engines = 2  # of a host
            config.rollout.slots = slots = 16 if large else 48
            config.rollout.prefill_rows = (slots // 4, slots)
    if preset.endswith("_lora"):
        config.lora.rank = 16
        config.lora.alpha = 32.0
        config.warm_start.learning_rate = 1e-4
        config.self_play.learning_rate = 2e-5
    return config
