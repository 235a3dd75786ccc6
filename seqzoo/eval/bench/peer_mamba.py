"""The peer of `seqzoo bench training`: transformers' Mamba with mambapy, on PyTorch.

A script of its own, run by the Python of an environment that has torch, transformers and mambapy (none of
them is a dependency of seqzoo). Prints one line of JSON.
"""

import argparse
import json
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("d_model", 256),
        ("n_layers", 4),
        ("d_state", 16),
        ("batch", 4),
        ("length", 512),
        ("steps", 5),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=256,
        hidden_size=args.d_model,
        num_hidden_layers=args.n_layers,
        state_size=args.d_state,
        use_mambapy=True,
        use_cache=False,
    )
    model = transformers.MambaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    seconds = []
    for _ in range(args.steps + 1):
        tokens = torch.randint(0, 256, (args.batch, args.length))
        started = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    per_step = statistics.median(seconds[1:])
    print(
        json.dumps(
            {
                "tokens_per_s": args.batch * args.length / per_step,
                "seconds_per_step": per_step,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
    )


if __name__ == "__main__":
    main()
