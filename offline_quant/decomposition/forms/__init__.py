"""Forms of decomposition by name, as `--basis` takes them. A new form is one file here and one entry in `FORMS`."""

from offline_quant.decomposition.forms.base import Form
from offline_quant.decomposition.forms.natural import Natural
from offline_quant.decomposition.forms.paper import Paper
from offline_quant.decomposition.forms.split import Split
from offline_quant.decomposition.forms.whitened import Whitened

FORMS: dict[str, Form] = {form.name: form for form in (Natural(), Whitened(), Paper(), Split())}
