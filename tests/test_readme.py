"The code of README.md runs as it stands there."
import re, shutil, pytest
import matplotlib.pyplot as plt
from pathlib import Path
from fastai.vision.all import get_image_files, load_learner, PILImage
from fastai_jocor.lab import commands
from pictures import digit_files

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT/'README.md').read_text(encoding='utf-8')

def blocks(language): return re.findall(rf'(?s)```{language}\n(.*?)```', README)

def test_code_for_your_own_data(tmp_path, monkeypatch, capsys):
    "Small digits in place of photographs, and random weights in place of a download"
    monkeypatch.chdir(tmp_path)
    Path('my_images').mkdir()
    digit_files(Path('my_images'), 320)
    shutil.copy(get_image_files('my_images')[0], 'some.jpg')
    code, = [o for o in blocks('python') if 'my_images' in o]
    for old,new in (('Resize(128)', 'Resize(32), num_workers=0'), ('resnet18,', 'resnet18, pretrained=False,')):
        assert code.count(old) == 1
        code = code.replace(old, new)
    space = {}
    exec(code, space)
    plt.close('all')
    assert len(space['audit'].table) == len(get_image_files('my_images')) and space['learn'].model.k == 3
    assert load_learner('my_images/export.pkl').predict(PILImage.create('some.jpg'))[0] in {'c0','c1','c2'}
    assert 'labels' in capsys.readouterr().out

def test_one_line_examples_are_of_names_that_exist():
    import fastai_jocor.all as everything
    short = [o for o in blocks('python') if 'import' not in o]
    assert len(short) == 2
    for name in re.findall(r'(\w+)\(', ''.join(short)):
        assert hasattr(everything, name) or name in ('fit_one_cycle','suspects'), name

@pytest.mark.parametrize('name', ('jocor_demo','jocor_audit'))
def test_commands_exist(name):
    assert any(re.search(rf'(?m)^{name}\b', o) for o in blocks('sh'))
    assert callable(getattr(commands, name))
