"What a test changes in the process is put back."
import os, random, sys, torch
import numpy as np
import matplotlib.pyplot as plt
from fastai.vision.all import Learner
from fastai_jocor import callback, losses
from leaks import flushes_denormal, nothing_leaks

def test_registrations_and_patches_go_back():
    names,fit = dict(losses.contrasts),Learner.fit
    with nothing_leaks():
        losses.contrasts['js'] = losses.contrasts.pop('kl')
        losses.made_here = callback.JoCorCallback.made_here = Learner.made_here = 1
        Learner.fit,callback.joint_loss = None,None
        callback.JoCorCallback.before_train = None
    assert losses.contrasts == names and list(losses.contrasts) == list(names)
    assert Learner.fit is fit and callback.joint_loss is losses.joint_loss and callback.JoCorCallback.before_train
    assert not any(hasattr(o, 'made_here') for o in (losses,callback.JoCorCallback,Learner))

def test_a_patch_that_comes_with_a_module_stays(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = 'from fastai.basics import *\n@patch\ndef made_there(self:Learner): return 3\n'
    (tmp_path/'made_patch.py').write_text(code)
    with nothing_leaks(): import made_patch
    assert Learner.made_there(None) == 3
    del Learner.made_there, sys.modules['made_patch']

def test_the_state_of_the_process_goes_back(tmp_path):
    here,path,threads = os.getcwd(),list(sys.path),torch.get_num_threads()
    states = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state()
    with nothing_leaks():
        os.chdir(tmp_path)
        sys.path.insert(0, str(tmp_path))
        os.environ['MADE_HERE'] = '1'
        random.random(), np.random.rand(), torch.rand(1)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads+1)
        torch.set_flush_denormal(True)
        torch.set_float32_matmul_precision('medium')
        plt.rcParams['figure.dpi'] = 7
        plt.figure()
    assert os.getcwd() == here and sys.path == path and 'MADE_HERE' not in os.environ
    assert torch.get_default_dtype() == torch.float32 and torch.get_num_threads() == threads
    assert not flushes_denormal() and torch.get_float32_matmul_precision() == 'highest'
    assert plt.rcParams['figure.dpi'] != 7 and not plt.get_fignums()
    python,numpy,own = states
    assert random.getstate() == python and np.random.get_state()[1].tolist() == numpy
    assert torch.equal(torch.get_rng_state(), own)
