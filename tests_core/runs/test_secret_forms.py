"""Secrets are found in the forms that they are written in, and ordinary training code stays."""

import pytest
from dida_core.runs.redaction import Redactor

# Each is a text with a canary, {}, whose every line with a part of it must be lost.
IN_CODE = r'''
DB_PASSWORD: str = "{}"
---
os.environ["HF_TOKEN"] = "{}"
---
headers = {{"Authorization": "token {}"}}
---
password = "with {} in, it & more"
---
password = f"{}" + rb'x'
---
if (token := "{}"):
---
subprocess.run(["mysql", "--password", "{}"])
---
run("tool --password {} --verbose")
---
url = "https://{}@host/x"
---
url = "https://me:{}@host/x"
---
url = "https://x.blob.net/a?sv=1&sig={}&se=2"
---
url = f"https://s3/x?X-Amz-Signature={}"
---
KEY = """-----BEGIN RSA PRIVATE KEY-----
{}
-----END RSA PRIVATE KEY-----"""
---
api_secret = """
first {}
second {}
"""
---
password = (
    "one"
    "{}"
)
---
password = \
    "{}"
---
password = "a" \
    "{}"
---
credentials = {{
    "user": "me",
    "value": "{}",
}}
---
login(
    "me",
    "{}",
)
---
session.auth = ("me", "{}")
---
HTTPBasicAuth("me", "{}")
---
user, password = "me", "{}"
---
password, user = "{}", "me"
---
os.environ.setdefault("OPENAI_KEY", "{}")
---
token = os.environ.get("HF_TOKEN", "{}")
---
parser.add_argument("--token", default="{}")
---
def connect(host, password="{}"):
---
if password == "{}":
---
password = None or "{}"
---
wandb.login(key="{}123abc")
---
# password: {}
---
# old password was: {}
---
"""
Server settings.

password: {}
"""
---
connection = "Server=x;User=me;Password={};Trusted=yes"
---
requests.get(url, cookies={{"a": "b"}}, headers={{"Cookie": "session={}"}})
---
headers["X-Api-Key"] = '{}'
---
apiKey = "{}"
---
GITHUB_PAT = "{}"
---
smtp_pass = "{}"
---
SECRET_KEY_BASE = "{}"
---
HF_TOKEN_READ = "{}7"
---
PASSWORD_PROD = "{}"
---
passwords = ["{}", "other"]
---
class Settings:
    password: str = field(default="{}")
---
config = {{
    "password":
        "{}",
}}
---
login(user="me", password="a"
      "{}")
---
environ["A"], environ["TOKEN"] = "x", "{}"
---
account = {{"user": "me", "pass": "{}"}}
---
for token in ["a", "{}"]:
---
setattr(self, "password", "{}")
---
kwargs = dict(lr=1, password = '{}')
---
wandb_key = "{}"
---
secrets = SimpleNamespace(openai="{}")
---
password = base64.b64decode("{}")
'''
IN_TEXT = r"""
password: {}
---
db_password: 'with {} in'
---
password: |
  {}
  second {}
other: 1
---
api_key:
  - {}
---
"apiKey": "{}",
---
secret_key = "{}"
---
HF_TOKEN={}
---
export OPENAI_KEY={}
---
export PGPASSWORD="with {}" && psql
---
ENV API_TOKEN {}
---
ENV API_TOKEN={}
---
curl -u me:{} https://x.org
---
curl -H "Authorization: Bearer {}" x
---
curl -H 'X-Auth-Token: {}' x
---
docker login -u me -p {} x
---
sshpass -p {} ssh x
---
machine x.org login me password {}
---
machine x.org
  login me
  password {}
---
localhost:5432:db:me:{}
---
Server=x;Password={} with more;Trusted=yes
---
DefaultEndpointsProtocol=https;AccountName=x;AccountKey={}==
---
postgresql://me:{}@host:5432/db
---
https://host/x?access_token={}&y=1
---
<password>{}</password>
---
<add key="password" value="{}"/>
---
- name: DB_PASSWORD
  value: {}
---
train.py --api-key {} EPOCHS=3
---
train.py --api-key={} EPOCHS=3
---
CREATE USER me WITH PASSWORD '{}';
---
CREATE USER me IDENTIFIED BY '{}';
---
password => '{}'
---
$password = "{}";
---
-----BEGIN OPENSSH PRIVATE KEY-----
{}
-----END OPENSSH PRIVATE KEY-----
---
_authToken={}
---
{{"cells": ["os.environ[\"HF_TOKEN\"] = \"{}\"\n"]}}
---
RuntimeError: login failed (user=me, password={})
---
COOKIE: session={}
---
db.passwd = {}
---
set -x API_TOKEN {}
---
pass: {}
---
openssl enc -pass pass:{}
---
echo {} | docker login --password-stdin
---
[credentials]
aws = {}
[other]
---
Ocp-Apim-Subscription-Key: {}
---
$h{{password}} = "{}";
---
<input type="password" value="{}">
---
password <- '{}'
---
mysql://me:{}@host
---
kennwort: {}
"""
BY_THEMSELVES = [
    "AKIAIOSFODNN7EXAMPLE", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "github_pat_11ABCDEFG0123456789_abc",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYz", "sk-proj-abc123DEF456ghi789", "xoxb-1234567890-abcdefGHIJ",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcDEF123", "glpat-abcDEF123456ghiJKL",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "kR7vQ2mZx9Lp4WsT8nYb3HdJ", "$2b$12$abcdefghijklmnopqrstuv", "npm_abcDEF123456ghiJKL789",
    "https://hooks.slack.com/services/T00/B00/abcdef",
]  # fmt: skip
ORDINARY = '''
import secrets
from transformers import AutoTokenizer
key = "image"
for key, value in config.items():
    print(key, "is", value)
names = sorted(d.keys(), key=lambda pair: pair[1])
tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
tokens = tokenizer("a text", max_length=512)
num_tokens = 512
cls_token = "[CLS]"
KEY_POINTS = 3
PASSES = 2
RESUME_KEYS = ("DATE", "EPOCHS")
monkey = "animal"
compass = "north"
author = "me"
config = {"lr": 1e-3, "MODEL": UNET, "LOSS": bce_loss, "EPOCHS": 20, "activ": "relu"}
token = tokenizer.next()
token = tokens[index]
password = os.environ["DB_PASSWORD"]
password = getpass.getpass()
def forward(self, tokens: Tensor, key: Tensor | None = None) -> Tensor:
    q, k = self.query(tokens), self.key(tokens)
    attention = (q @ k.T) / math.sqrt(self.key_dim)
login(user, password=password, token=args.token)
api_key: str | None = None
transform = LoadImaged(keys=["image", "label"], image_key="image")
model = torch.load("weights/best.pt", map_location="cpu", weights_only=True)
PATH = "/data/Sentinel2/S2A_MSIL1C_20170105T013442_N0204_R031_T53NMJ_20170105T013443.SAFE"
sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
def __init__(self, num_passes: int = 2, first_pass: bool = True) -> None:
    """:param token: of a word"""
    pass
url = "https://github.com/dida-do/x.git@main"
headers = {"Authorization": f"Bearer {token}"}
model = timm.create_model("vit_large_patch14_clip_224.openai_ft_in12k_in1k", pretrained=True)
first_pass, second_pass = self.encoder(x), self.decoder("mean")
raise ValueError(f"one pass: {x} of {y}")
loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0]), ignore_index=255)
'''.strip()


CODE, TEXT = ([form.strip("\n") for form in forms.split("\n---\n")] for forms in (IN_CODE, IN_TEXT))


@pytest.mark.parametrize(
    ("form", "is_code"), [(form, True) for form in CODE] + [(form, False) for form in TEXT]
)
@pytest.mark.parametrize("canary", ["correcthorse", "hunter2-x"])
def test_a_secret_is_found_in_each_form(form, is_code, canary):
    redactor, text = Redactor({}, []), form.format(*[canary] * form.count("{}"))
    lines = text.split("\n")
    lost = redactor.secret_lines(f"x = 1\n{text}\ny = 2", is_code)
    left = [line for number, line in enumerate(lines, start=1) if number not in lost]
    assert not [line for line in left if canary in line]
    assert not lost & {0, len(lines) + 1}
    assert canary not in redactor.text(text)


@pytest.mark.parametrize("secret", BY_THEMSELVES)
def test_a_secret_is_found_by_its_own_form(secret):
    assert secret not in Redactor({}, []).text(f"x = '{secret}'")


def test_ordinary_code_stays():
    lost = Redactor({}, []).secret_lines(ORDINARY, is_code=True)
    assert [ORDINARY.split("\n")[number] for number in sorted(lost)] == []


ODD = ["key ", "password = [", "token=[(", "token: a, ", "password = [\n", "password(\n", '"password" \\\n']
ODD += [
    'password = "a" ',
    "echo ",
    "mysql ",
    "-eyJ",
    "-ghp_",
    '"\\',
    "# password = \\\n",
    "key\n",
    "\\",
    "://a:",
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("odd", ODD)
def test_odd_texts_take_no_long_time_and_hide_nothing(odd):
    lines = (odd * (100_000 // len(odd))).rstrip("\n")
    text = f"password = 'hunter2-x'\n{lines}\n\n\ntoken = 'hunter2-x'"
    for is_code in (True, False):
        lost = Redactor({}, []).secret_lines(text, is_code)
        assert {0, text.count("\n")} <= lost
        assert 1 in lost or "password = [" not in lines or "\n" in lines
    assert "hunter2" not in Redactor({}, []).text(text)
