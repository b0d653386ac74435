"k networks as one, and how they are made from one model."
import copy, pytest, torch
from torch import nn
from fastai.vision.all import xresnet18, create_head, params
from fastai_jocor.peers import *
from fastai_jocor.lab.datasets import jocor_cnn, jocor_mlp

def transformer():
    return nn.Sequential(nn.Embedding(9,6), nn.TransformerEncoderLayer(6, 2, batch_first=True), nn.Linear(6,10))

@pytest.mark.parametrize('make', (jocor_mlp, jocor_cnn, lambda: xresnet18(n_out=10), transformer))
def test_every_drawn_weight_differs(make):
    peers = make_peers(make(), 3, seed=1)
    for name,p in peers.peer(0).named_parameters():
        others = [dict(m.named_parameters())[name] for m in peers.peers[1:]]
        if p.std() > 0: assert not any(torch.equal(p,o) for o in others) and not torch.equal(*others), name

def test_batchnorm_starts_afresh():
    m = jocor_cnn()
    m(torch.rand(4,3,32,32)+3)
    fresh = make_peers(m, 2).peer(1)
    assert (fresh[1].running_mean == 0).all() and not (m[1].running_mean == 0).all()

def test_seed_decides_and_the_global_state_stays():
    m = jocor_mlp()
    torch.manual_seed(0)
    a = make_peers(m, 3, seed=4); r = torch.rand(1)
    torch.manual_seed(0); assert torch.equal(torch.rand(1), r)
    b = make_peers(m, 3, seed=4)
    assert all(torch.equal(p,q) for p,q in zip(a.parameters(), b.parameters()))
    c = make_peers(m, 3, seed=5)
    assert not torch.equal(a.peer(1)[1].weight, c.peer(1)[1].weight)

def test_head_only():
    m = nn.Sequential(jocor_cnn()[:-2], create_head(16, 10))
    split = lambda m: [params(m[0]), params(m[1])]
    a,b = make_peers(m, 2, init='head', splitter=split).peers
    assert all(torch.equal(p,q) for p,q in zip(a[0].parameters(), b[0].parameters()))
    assert not any(torch.equal(p,q) for p,q in zip(a[1].parameters(), b[1].parameters()) if p.std()>0)

def test_modes_and_gradients():
    peers = make_peers(jocor_mlp(), 3)
    x = torch.rand(5,1,28,28)
    z = peers.train()(x)
    assert z.shape == (3,5,10)
    z[1].sum().backward()
    assert (peers.peer(0)[1].weight.grad == 0).all() and (peers.peer(1)[1].weight.grad != 0).any()
    with torch.no_grad(): p = torch.stack([m(x).softmax(-1) for m in peers.eval().peers]).mean(0)
    torch.testing.assert_close(peers(x).exp(), p)

def test_best_peer():
    good,bad = nn.Linear(3,3),nn.Linear(3,3)
    with torch.no_grad(): good.weight.copy_(torch.eye(3)); bad.weight.copy_(-torch.eye(3))
    x = torch.eye(3)
    assert Peers([bad,good]).best_peer([(x, torch.arange(3))]) is good

def test_same_weights_are_refused():
    m = jocor_mlp()
    with pytest.raises(ValueError, match='same weights'): make_peers([m, copy.deepcopy(m)])
    with pytest.raises(ValueError, match='share parameters'): make_peers([m, nn.Sequential(m)])
    with pytest.raises(ValueError, match='same weights'): make_peers(lambda: copy.deepcopy(m), 2)

def test_a_seed_that_made_the_model_makes_no_twin():
    torch.manual_seed(0)
    assert make_peers(jocor_mlp(), 2, seed=0).k == 2
