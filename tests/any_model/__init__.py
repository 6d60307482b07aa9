import pytest

pytest.register_assert_rewrite("tests.any_model.journey")
