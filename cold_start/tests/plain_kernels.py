"""Flash attention in plain torch, which tests use on CPUs instead of kernels that only run on GPUs."""

import torch


class PlainKernels:
    """What flash kernels compute, sequence by sequence, with every matrix written out."""

    @staticmethod
    def pieces(query, key, value, bounds, is_causal, scaling):
        """Of each sequence: its tokens, query, key, value and scores, [heads, length, ...], keys repeated."""
        groups = query.shape[1] // key.shape[1]
        for start, end in bounds[0].unfold(0, 2, 1).tolist():
            tokens = slice(start, end)
            q, k, v = (tensor[tokens].transpose(0, 1) for tensor in (query, key, value))
            k, v = (tensor.repeat_interleave(groups, dim=0) for tensor in (k, v))
            scores = q @ k.transpose(1, 2) * scaling
            if is_causal:
                scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
            yield tokens, q, k, v, scores

    @classmethod
    def forward(cls, query, key, value, bounds, longest, *, is_causal, scaling):
        output, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query))
        for tokens, _, _, v, scores in cls.pieces(query, key, value, bounds, is_causal, scaling):
            output[tokens] = (scores.softmax(-1) @ v).transpose(0, 1)
            lse[:, tokens] = scores.logsumexp(-1)
        return output, lse

    @classmethod
    def backward(cls, gradient, query, key, value, output, lse, bounds, longest, *, is_causal, scaling):
        totals = tuple(torch.zeros_like(tensor) for tensor in (query, key, value))
        for tokens, q, k, v, scores in cls.pieces(query, key, value, bounds, is_causal, scaling):
            to_output = gradient[tokens].transpose(0, 1)
            probabilities = (scores - lse[:, tokens].unsqueeze(-1)).exp()
            delta = (gradient[tokens] * output[tokens]).sum(-1).t().unsqueeze(-1)
            to_scores = probabilities * (to_output @ v.transpose(1, 2) - delta) * scaling
            shares = (to_scores @ k, to_scores.transpose(1, 2) @ q, probabilities.transpose(1, 2) @ to_output)
            for total, share in zip(totals, shares, strict=True):
                total[tokens] = share.transpose(0, 1).unflatten(1, (total.shape[1], -1)).sum(2)
        return totals
