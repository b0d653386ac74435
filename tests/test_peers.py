"k networks as one, and how they are made from one model."
import copy, pytest, torch
from torch import nn
from fastai.vision.all import xresnet18, create_head, params
from fastai_jocor.copies import *
from fastai_jocor.peers import *
from fastai_jocor.all import JoCorCallback
from fastai_jocor.lab.datasets import jocor_cnn, jocor_mlp
from learners import tensors

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

class WithStates(nn.Linear):
    def forward(self, x): return super().forward(x),[x]

@pytest.mark.parametrize('layer', (nn.Linear, WithStates))
def test_best_peer_of_tables_and_texts(layer):
    "Labels of shape (N, 1), as a table has them; a text classifier returns its states too"
    good,bad,x = layer(3,3),layer(3,3),torch.eye(3).repeat(5,1)
    with torch.no_grad():
        good.weight.copy_(torch.eye(3))
        bad.weight.copy_(torch.eye(3)[[0,2,1]])
    y = torch.tensor([0,0,0,0,1,2]+[0]*9)[:,None]
    y[6:] = torch.arange(3).repeat(3)[:,None]
    for peers in ([bad,good],[good,bad]): assert Peers(peers).best_peer([(x, y)]) is good

def test_same_weights_are_refused():
    m = jocor_mlp()
    with pytest.raises(ValueError, match='same weights'): make_peers([m, copy.deepcopy(m)])
    with pytest.raises(ValueError, match='share parameters'): make_peers([m, nn.Sequential(m)])
    with pytest.raises(ValueError, match='same weights'): make_peers(lambda: copy.deepcopy(m), 2)

def test_a_seed_that_made_the_model_makes_no_twin():
    torch.manual_seed(0)
    assert make_peers(jocor_mlp(), 2, seed=0).k == 2

# --- what is frozen

def same_state(a, b): return all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))

def trained_body(train_norms=False):
    "A frozen body, whose norms have learned something, and a head"
    body = nn.Sequential(nn.Linear(8,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8,6), nn.LayerNorm(6))
    body(torch.randn(50,8)+3)
    for m in body:
        norm = isinstance(m, (nn.BatchNorm1d, nn.LayerNorm))
        if norm: nn.init.normal_(m.weight)
        for p in m.parameters(): p.requires_grad_(norm and train_norms)
    return nn.Sequential(body, nn.Linear(6,3))

@pytest.mark.parametrize('train_norms', (False,True))
def test_what_is_frozen_by_hand_stays(train_norms):
    "And so do the norms of a frozen body, also if they train"
    model = trained_body(train_norms)
    old = copy.deepcopy(model)
    learn = tensors(torch.randn(40,8), torch.randint(0,3,(40,)), model).to_peers(3, seed=0)
    for m in learn.model.peers: assert same_state(m[0], old[0])
    a,b,c = [m[1].weight for m in learn.model.peers]
    assert not (torch.equal(a, b) or torch.equal(a, c) or torch.equal(b, c))

def test_a_frozen_body_is_the_same_after_a_fit():
    model = trained_body()
    old = copy.deepcopy(model)
    learn = tensors(torch.randn(40,8), torch.randint(0,3,(40,)), model)
    learn.fit(1, 1e-2, cbs=JoCorCallback(k=2, rule='schedule', forget_rate=0.))
    for m in learn.model.peers: assert torch.equal(m[0][0].weight, old[0][0].weight)

def test_a_frozen_parameter_is_not_shuffled():
    model = nn.Sequential(nn.Linear(4,4))
    model.place = nn.Parameter(torch.arange(20.), requires_grad=False)
    model.token = nn.Parameter(torch.arange(20.))
    a,b = make_peers(model, 2, seed=0).peers
    assert torch.equal(a.place, b.place) and not torch.equal(a.token, b.token)

def test_nothing_left_to_draw_anew():
    model = trained_body()
    model[1].requires_grad_(False)
    with pytest.raises(ValueError, match="init='all' changed nothing, and 10 of 10 parameters are frozen"):
        make_peers(model, 2)

def test_all_layers_that_fastai_has_frozen_are_drawn_anew():
    "They will be trained after `unfreeze`; the optimizer's frozen groups stay"
    split = lambda m: [params(m[0]), params(m[1])]
    learn = tensors(torch.randn(40,8), torch.randint(0,3,(40,)), nn.Sequential(nn.Linear(8,6), nn.Linear(6,3)))
    learn.splitter = split
    learn.freeze()
    learn.to_peers(2, init='all', seed=0)
    a,b = learn.model.peers
    assert not torch.equal(a[0].weight, b[0].weight)
    assert [p.requires_grad for m in (a,b) for p in m.parameters()] == [False,False,True,True]*2
    assert learn.opt.frozen_idx == 1

# --- groups

def test_a_head_of_a_model_with_one_group_is_its_last_layer():
    learn = tensors(torch.randn(40,8), torch.randint(0,3,(40,)), nn.Sequential(nn.Linear(8,6), nn.Linear(6,3)))
    learn.pretrained = True
    a,b = learn.to_peers(2).model.peers
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[1].weight, b[1].weight)
    with pytest.raises(ValueError, match="init='head' needs a body and a head, and Linear has no two layers"):
        make_peers(nn.Linear(8,3), 2, init='head')

def test_groups_as_fastai_takes_them():
    model = nn.Linear(2,3)
    assert [len(g) for g in as_groups(params(model))] == [2]
    assert [len(g) for g in as_groups([[model.weight],[model.bias]])] == [1,1]
    assert [len(g) for g in as_groups([])] == [0]

# --- weights that a layer computes from others

@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('derive', (nn.utils.weight_norm, nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm))
def test_derived_weights_differ(derive):
    make = lambda: nn.Sequential(derive(nn.Linear(8,8)), nn.ReLU(), derive(nn.Linear(8,3)))
    peers = make_peers(make(), 3, seed=0).train()
    out = peers(torch.randn(20,8))
    assert out.isfinite().all()
    for at in (0,2):
        a,b,c = [m[at].weight for m in peers.peers]
        assert not (torch.equal(a, b) or torch.equal(a, c) or torch.equal(b, c))
