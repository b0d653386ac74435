"The contrasts and the joint loss, against their definition."
import itertools, pytest, torch
import numpy as np
import torch.nn.functional as F
from hypothesis import given, strategies as st
from fastai_jocor.losses import contrasts, joint_loss, peer_contrast, plain_lambda
import reference

def pairs_of(k, kind):
    "Ordered pairs of peers that a contrast compares"
    if k == 1: return []
    if kind.endswith('circular'): return [(m,(m+1)%k) for m in range(k)]
    return list(itertools.permutations(range(k), 2))

def slow_contrast(z, kind):
    "The definition, pair by pair and item by item, in float64 numpy"
    z = np.asarray(z.cpu(), dtype=np.float64)
    k,N,_ = z.shape
    lp = z - z.max(-1, keepdims=True)
    lp = lp - np.log(np.exp(lp).sum(-1, keepdims=True))
    out = np.zeros(N)
    for m,n in pairs_of(k, kind):
        for i,c in np.ndindex(z.shape[1:]):
            a,b = lp[m,i,c],lp[n,i,c]
            out[i] += np.exp(a)*(a-b) if kind.startswith('kl') else -np.exp(a)*b
    return out

sizes = st.integers(1,6), st.integers(1,9), st.integers(2,12)
shapes = st.tuples(*sizes, st.integers(0,2**31-1), st.sampled_from([.1,1.,10.]))

def make(k, N, C, seed, scale):
    "Logits and labels on the default device, the same ones on each"
    g,here = torch.Generator().manual_seed(seed),torch.get_default_device()
    z = torch.randn(k,N,C, generator=g, dtype=torch.float64, device='cpu')*scale
    return z.to(here),torch.randint(0,C,(N,), generator=g, device='cpu').to(here)

@pytest.mark.parametrize('kind', contrasts)
@given(a=shapes)
def test_contrast_is_the_sum_over_pairs(kind, a):
    z,_ = make(*a)
    np.testing.assert_allclose(peer_contrast(z, kind).cpu(), slow_contrast(z, kind), rtol=1e-9, atol=1e-9)
    single = peer_contrast(z.float(), kind).cpu()
    np.testing.assert_allclose(single, slow_contrast(z.float(), kind), rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('kind', contrasts)
@given(a=shapes, lam=st.floats(0,1))
def test_joint_loss(kind, a, lam):
    z,y = make(*a)
    k = len(z)
    ce = sum(F.cross_entropy(o, y, reduction='none') for o in z)
    pairs = len(pairs_of(k, kind))
    want = ce if k==1 else (1-lam)*ce + lam*k/pairs*torch.tensor(slow_contrast(z, kind))
    torch.testing.assert_close(joint_loss(z, y, lam, kind), want, rtol=1e-9, atol=1e-9)

@given(a=shapes)
def test_two_peers_give_the_published_loss(a):
    z,y = make(2, *a[1:])
    want = reference.joint_losses(z, y, .9)
    for kind in ('kl','kl_circular'): torch.testing.assert_close(joint_loss(z, y, .9, kind), want)

@given(a=shapes)
def test_kl_is_symmetric_in_the_peers_and_never_negative(a):
    z,_ = make(*a)
    torch.testing.assert_close(peer_contrast(z), peer_contrast(z.flip(0)))
    assert (peer_contrast(z) >= -1e-9).all()
    alike = peer_contrast(z[:1].expand(4,-1,-1))
    torch.testing.assert_close(alike, torch.zeros_like(alike), atol=1e-9, rtol=0)

@given(a=shapes, lam=st.floats(.05,.95), kind=st.sampled_from(list(contrasts)))
def test_gradient_of_the_fast_form(a, lam, kind):
    k,N,C,seed,_ = a
    z,y = make(k, min(N,3), min(C,4), seed, 1.)
    assert torch.autograd.gradcheck(lambda z: joint_loss(z, y, lam, kind), z.requires_grad_())

@pytest.mark.parametrize('dtype', (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize('kind', contrasts)
def test_extreme_logits(kind, dtype):
    z,y = make(4, 64, 10, 0, 1.)
    z = (z.sigmoid()*2-1).mul(1e4).to(dtype).requires_grad_()
    loss = joint_loss(z, y, .9, kind)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and z.grad.isfinite().all()

def test_official_coding_has_a_nan_gradient_where_ours_has_none():
    z = torch.tensor([[[200.,0.]],[[0.,0.]]], requires_grad=True)
    F.kl_div(F.log_softmax(z[1],-1), F.softmax(z[0],-1), reduction='none').sum().backward()
    assert z.grad.isnan().any()
    ours = z.detach().clone().requires_grad_()
    joint_loss(ours, torch.tensor([1]), .9).sum().backward()
    assert ours.grad.isfinite().all()

@given(k=st.integers(2,7), lam=st.floats(0,.99), kind=st.sampled_from(list(contrasts)), seed=st.integers(0,99))
def test_plain_lambda_gives_the_plain_sum_up_to_a_factor(k, lam, kind, seed):
    z,y = make(k, 6, 5, seed, 1.)
    plain = (1-lam)*sum(F.cross_entropy(o, y, reduction='none') for o in z) + lam*peer_contrast(z, kind)
    ours = joint_loss(z, y, plain_lambda(lam, k, kind), kind)
    torch.testing.assert_close(plain/plain.sum(), ours/ours.sum())

def test_cost_is_linear_in_the_number_of_peers():
    "Elements that the forward pass touches, counted at the level of tensor operations"
    from torch.utils._python_dispatch import TorchDispatchMode
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): self.n += out.numel()
            return out
    def touched(k, kind):
        z,y = torch.randn(k,8,10),torch.randint(0,10,(8,))
        with Count() as c: joint_loss(z, y, .9, kind)
        return c.n
    for kind in contrasts: assert touched(16,kind) <= 8.5*touched(2,kind)

def test_custom_loss_is_called_per_peer():
    z,y = make(3, 5, 4, 0, 1.)
    w = torch.tensor([1.,2,3,4], dtype=torch.float64)
    lf = lambda z,y: F.cross_entropy(z, y, weight=w, reduction='none')
    torch.testing.assert_close(joint_loss(z, y, .3, loss_func=lf), .7*sum(lf(o,y) for o in z) + .3*peer_contrast(z)/2)

BAD = [((1.01,), 'co_lambda=1.01'), ((-.1,), 'co_lambda=-0.1'), ((float('nan'),), 'co_lambda=nan'),
    ((.5,'js'), "contrast='js'")]

@pytest.mark.parametrize('args,msg', BAD)
def test_bad_input(args, msg):
    z,y = make(2, 3, 4, 0, 1.)
    with pytest.raises(ValueError, match=msg): joint_loss(z, y, *args)
