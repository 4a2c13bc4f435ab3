"""Builds the tokenizer: byte-level BPE with Qwen2's pre-tokenizer, so that any text survives a round trip.

    python tokenizer.py MODEL_DIR
"""
import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import questions as q

VOCAB = 1024
SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>']
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or content['type'] == 'image_url' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def corpus (seed=1):
    rng = random.Random(seed)
    random.seed(seed)

    def scene ():
        return [{'shape': rng.choice(q.SHAPES), 'colour': rng.choice(q.COLOURS), 'x': rng.random(), 'y': rng.random()} for _ in range(rng.randint(1, 6))]
    for _ in range(20000):
        for qa in (q.ask(rng, scene()), q.ask_several(rng, [scene(), scene(), scene()]), q.ask_text(rng)):
            if qa:
                yield q.vary(rng, qa[0])
                yield qa[1]
    for word in q.WORDS:
        for _ in range(12):
            yield ' ' + word
    for system in q.SYSTEMS:
        for _ in range(40):
            yield system
    for _ in range(200):
        yield 'user\n'
        yield 'assistant\n'
        yield 'system\n'


def build (out):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior='isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL), min_frequency=2, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / 'tokenizer.json'))
    ids = {t: tokenizer.token_to_id(t) for t in SPECIAL}
    config = {
        'add_bos_token': False,
        'add_prefix_space': False,
        'added_tokens_decoder': {
            str(i): {'content': t, 'lstrip': False, 'normalized': False, 'rstrip': False, 'single_word': False, 'special': True} for t, i in ids.items()
        },
        'additional_special_tokens': SPECIAL[1:],
        'bos_token': None,
        'chat_template': CHAT_TEMPLATE,
        'clean_up_tokenization_spaces': False,
        'context_image_token': '<IMG_CONTEXT>',
        'end_image_token': '</img>',
        'start_image_token': '<img>',
        'eos_token': '<|im_end|>',
        'errors': 'replace',
        'model_max_length': 4096,
        'pad_token': '<|endoftext|>',
        'processor_class': 'InternVLProcessor',
        'split_special_tokens': False,
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'unk_token': None
    }
    (out / 'tokenizer_config.json').write_text(json.dumps(config, indent=2) + '\n')
    return tokenizer


if __name__ == '__main__':
    t = build(sys.argv[1])
    print(t.get_vocab_size(), {s: t.token_to_id(s) for s in SPECIAL})
