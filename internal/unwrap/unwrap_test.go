package unwrap

import (
	"io"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

type (
	exported struct{ Reader io.Reader }
	embedded struct{ io.Reader }
	hidden   struct{ reader io.Reader }
	other    struct{ Reader string }
	promoted struct{ *exported }
)

func TestField(t *testing.T) {
	r := strings.NewReader("")
	for _, v := range []any{exported{r}, &exported{r}, embedded{r}, &embedded{r}} {
		require.Equal(t, r, Field[io.Reader](v, "Reader"))
	}
	for _, v := range []any{nil, 1, (*exported)(nil), exported{}, hidden{r}, other{"x"}, promoted{}, promoted{&exported{r}}} {
		require.Nil(t, Field[io.Reader](v, "Reader"), "%T", v)
	}
}
