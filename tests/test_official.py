"Figures of the official JoCoR code (data/jocor_official.json; its `about` says how each input is made)."
import json, numpy as np, pytest, torch
from pathlib import Path
from fastai_jocor.losses import joint_loss
from fastai_jocor.noise import Asymmetric, PairFlip, Symmetric
from fastai_jocor.selection import forget_schedule, precision_and_recall, select_small

GOLDEN = json.loads((Path(__file__).parent/'data'/'jocor_official.json').read_text())

MAPS = dict(mnist='mnist', cifar10='cifar10', cifar100='cifar100_official')

def test_all_figures_are_here():
    assert {k: len(GOLDEN[k]) for k in ('noise','loss','schedule')} == dict(noise=15, loss=5, schedule=5)

def noise_of(g):
    "The noise model of a figure"
    if g['noise'] == 'asymmetric': return Asymmetric(g['rate'], MAPS[g['dataset']])
    return dict(symmetric=Symmetric, pairflip=PairFlip)[g['noise']](g['rate'])

@pytest.mark.parametrize('g', GOLDEN['noise'], ids=lambda g: f"{g['dataset']}-{g['noise']}-{g['rate']}")
def test_corruption(g):
    y = np.random.RandomState(g['labels_seed']).randint(0, g['n_classes'], g['n'])
    assert noise_of(g).official().corrupt(y, g['n_classes'], g['seed']).tolist() == g['noisy']

@pytest.mark.parametrize('g', GOLDEN['loss'], ids=lambda g: f"N{g['N']}-C{g['C']}-lambda{g['co_lambda']}")
def test_loss_selection_and_gradients(g):
    rs = np.random.RandomState(g['rng_seed'])
    z = torch.tensor(np.stack([rs.randn(g['N'],g['C'])*g['logit_scale'] for _ in range(2)]), requires_grad=True)
    y,clean = torch.tensor(rs.randint(0,g['C'],g['N'])),torch.tensor(rs.rand(g['N']) > 1-g['clean_flag_prob'])
    loss = joint_loss(z, y, g['co_lambda'])
    kept = select_small(loss, g['forget_rate'])
    if g['per_sample'] is not None: np.testing.assert_allclose(loss.detach(), g['per_sample'], rtol=1e-9)
    assert sorted(kept.tolist()) == sorted(g['selected'])
    times = torch.zeros(g['N']).index_fill(0, kept, 1)
    assert precision_and_recall(times, clean)[0] == pytest.approx(g['pure_ratio'])
    loss[kept].mean().backward()
    assert loss[kept].mean().item() == pytest.approx(g['loss'], rel=1e-9)
    for i in (0,1): assert z.grad[i].abs().sum().item() == pytest.approx(g[f'grad{i+1}_sum_abs'], rel=1e-9)

@pytest.mark.parametrize('g', GOLDEN['schedule'], ids=lambda g: f"{g['n_epoch']}-{g['forget_rate']}-{g['exponent']}")
def test_schedule(g):
    got = forget_schedule(g['forget_rate'], g['n_epoch'], g['num_gradual'], g['exponent'])
    np.testing.assert_allclose(got, g['schedule'], atol=1e-9)
