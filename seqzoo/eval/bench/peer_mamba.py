"""The peer of `seqzoo bench training`: transformers' Mamba with mambapy, on PyTorch.

A script of its own, run by the Python of an environment that has torch, transformers and mambapy:
none of them is a dependency of seqzoo. It trains one update for each line that it reads, and
answers with a line of JSON.
"""

import argparse
import json
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("d_model", 256),
        ("n_layers", 4),
        ("d_state", 16),
        ("batch", 4),
        ("length", 512),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    import mambapy  # noqa: F401  (without it transformers would fall back silently)
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=256,
        hidden_size=args.d_model,
        num_hidden_layers=args.n_layers,
        state_size=args.d_state,
        use_bias=False,
        use_mambapy=True,
        use_cache=False,
    )
    model = transformers.MambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    name = f"transformers {transformers.__version__} + mambapy, torch {torch.__version__}"
    print(json.dumps({"name": name, "parameters": sum(p.numel() for p in model.parameters())}))
    sys.stdout.flush()

    for _ in sys.stdin:
        tokens = torch.randint(0, 256, (args.batch, args.length))
        started = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
