"""Estimators of a gradient through the choice of a code: their values, and gradients from their equations."""

import pytest
import torch

from taming.modules.quantizers.estimators import ESTIMATORS, check_estimator, diveq, estimate, rotate


def pair(*shape, **options):
    return torch.randn(shape, **options), torch.randn(shape, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_result_is_the_code(estimator):
    z, z_q = pair(3, 5, 8)
    assert estimate(z, z_q, estimator) is z_q  # nothing needs a gradient
    z.requires_grad_()
    torch.testing.assert_close(estimate(z, z_q, estimator), z_q)
    noisy = estimate(z, z_q, estimator, training=True)
    assert torch.allclose(noisy, z_q, atol=1e-4) == (estimator != "diveq")
    torch.testing.assert_close((noisy - z).norm(dim=-1), (z_q - z).norm(dim=-1))
    with torch.no_grad():
        assert estimate(z, z_q, estimator, training=True) is z_q


def test_straight_through_copies_the_gradient():
    (z, z_q), probe = pair(3, 8), torch.randn(3, 8)
    z.requires_grad_()
    (estimate(z, z_q) * probe).sum().backward()
    assert torch.equal(z.grad, probe)


def test_the_rotation_keeps_the_angle_of_the_gradient():
    (z, z_q), probe = pair(20, 8, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    z.requires_grad_()
    (rotate(z, z_q) * probe).sum().backward()
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(z.grad, z.detach(), dim=-1), cosine(probe, z_q, dim=-1))
    scale = z_q.norm(dim=-1) / z.detach().norm(dim=-1)
    torch.testing.assert_close(z.grad.norm(dim=-1), scale * probe.norm(dim=-1))


def test_opposite_and_vanishing_vectors_rotate():
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    z_q = torch.tensor([[-2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    result = rotate(z, z_q)
    result.sum().backward()
    torch.testing.assert_close(result[0], z_q[0])
    assert result.isfinite().all() and z.grad.isfinite().all()


def test_diveq_moves_latents_and_codes():
    (z, z_q), probe = pair(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    z.requires_grad_()
    z_q.requires_grad_()
    (diveq(z, z_q, std=0.0) * probe).sum().backward()
    direction = torch.nn.functional.normalize((z_q - z).detach(), dim=-1)
    along = (probe * direction).sum(-1, keepdim=True) * direction
    torch.testing.assert_close(z_q.grad, along)
    torch.testing.assert_close(z.grad, probe - along)


def test_bad_input():
    with pytest.raises(ValueError, match="estimator: 'ste': give one of straight_through, rotation, diveq"):
        check_estimator("ste")
