package e2e

import (
	"testing"

	"github.com/acceptq/acceptq/internal/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }
