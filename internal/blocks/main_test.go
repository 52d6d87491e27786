package main

import (
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
)

func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, name := range programs {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(err)
		}
	}
}

func TestBlocks(t *testing.T) {
	need(t, "bash", "gofmt")
	for _, row := range []struct {
		text     string
		runs, ok bool
	}{
		{"```sh\ngo vet ./...  # all\nGOOS=js go test .\n```\n", true, true},
		{"```sh\nsudo sysctl -w a=1\n```\n", false, true},
		{"```sh\ngo install x\n```\n", false, true},
		{"```sh\ncd bench\n```\n", false, true},
		{"```sh\nif true\n```\n", false, false},
		{"```go\nx := 1\n```\n", false, true},
		{"```go\ntype x int\n```\n", false, true},
		{"```go\nx := \n```\n", false, false},
		{"```go\npackage main\nfunc {\n```\n", false, false},
		{"```yaml\n{\n```\n", false, true},
		{"```sh\n", false, false},
	} {
		blocks := read("a.md", row.text)
		require.Len(t, blocks, 1, row.text)
		require.Equal(t, row.runs, blocks[0].runs(), row.text)
		require.Equal(t, row.ok, blocks[0].check(true) == nil, row.text)
	}
	require.Equal(t, "why", read("a.md", "<!-- not run: why -->\n```sh\nx\n```\n")[0].notRun)
	require.Equal(t, "why", read("a.md", "<!-- not run: why -->\n\n```sh\nx\n```\n")[0].notRun)
	require.Empty(t, read("a.md", "<!-- not run: why -->\ntext\n```sh\nx\n```\n")[0].notRun)
	require.Empty(t, read("a.md", "<!-- not run: why -->\n```sh\nx\n```\n```sh\ny\n```\n")[1].notRun)
}

func TestBlockThatFails(t *testing.T) {
	need(t, "bash", "go")
	failing := block{page: "a.md", kind: "sh", text: "go vet ./none-such\n"}
	require.True(t, failing.runs())
	require.Error(t, failing.check(false))
	failing.notRun = "it fails"
	require.NoError(t, failing.check(false))
}

func TestProgramThatFails(t *testing.T) {
	need(t, "go", "gofmt")
	require.NoError(t, block{kind: "go", text: "package main\n\nfunc main() {}\n"}.check(false))
	require.Error(t, block{kind: "go", text: "package main\n\nfunc main() { undefined() }\n"}.check(false))
	fragment := func(page, text string) block { return block{page: page, kind: "go", text: text} }
	require.NoError(t, fragment("README.md", "log.Print(1)\n").check(false))
	require.Error(t, fragment("README.md", "log.Print(srv)\n").check(false))
	require.Error(t, fragment("README.md", "x := 1\n").check(false), "x is not used")
	require.NoError(t, fragment("README.md", "func f() { log.Print(1) }\n").check(false))
	require.Error(t, fragment("README.md", "func f() { log.Print(srv) }\n").check(false))
	require.NoError(t, fragment("docs/a.md", "log.Print(srv)\n").check(false))
}

func TestModuleOfABlock(t *testing.T) {
	for text, folder := range map[string]string{
		"log.Print(1)":                  ".",
		"acceptqprom.NewCollector()":    "prom",
		"acceptqotel.New(otel.Meter())": "otel",
	} {
		program, in := block{page: "README.md", text: text}.program()
		require.Equal(t, folder, in)
		require.Contains(t, program, text)
	}
}
